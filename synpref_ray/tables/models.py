"""Model folders under the workspace: made whole, found by name, and brought to the local disk of whoever loads them.

A model lives at `models/<name>/`. Libraries load from local paths, so on object storage a folder is fetched once per node into the user's cache.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from synpref_ray.bundled import digest_folder, digest_model, pin_model, resolve_model
from synpref_ray.errors import InputError, SynprefError
from synpref_ray.tables.objects import S3Objects, is_s3
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.storage import Storage

RECORD_FILE = "training_record.json"


@dataclass(frozen=True)
class StoredModel:
    """A model of the workspace; `digest` names its content (weights, tokenizer, template)."""

    storage: Storage
    name: str
    digest: str

    @property
    def path(self) -> str:
        """Path of the folder under the workspace."""
        return f"models/{self.name}"

    def local_folder(self) -> str:
        """Return a local folder with the model, fetched from object storage the first time a node asks."""
        return self.storage.local_path(self.path) if self.storage.is_local else _fetched(self.storage, self.path, self.digest)


def model_digest(name: str) -> str:
    """Return the digest of a model that a user names; of one on the hub without its weights (`digest_model`).

    Raises:
        InputError: the folder is no model.
    """
    return digest_folder(model_folder(name)) if is_s3(name) else digest_model(name)


def pinned_model(name: str) -> str:
    """Return a name by which other processes load just what `model_digest` digests.

    Raises:
        InputError: the folder is no model.
    """
    return name if is_s3(name) else pin_model(name)


def model_folder(name: str, *, weights: bool = True) -> str:
    """Return the local folder of a model that a user names: a folder on S3 (fetched once per content), or whatever `resolve_model` knows.

    Args:
        weights: whether those of a model on the hub are needed.

    Raises:
        InputError: the folder is no model.
    """
    if not is_s3(name):
        return resolve_model(name, weights=weights)
    contents = S3Objects.at(name).contents("")
    if "config.json" not in [path for path, _, _ in contents]:
        raise InputError(f"{name} is not a model folder: it has no config.json")
    parent, _, folder = name.rstrip("/").rpartition("/")
    return _fetched(Storage(parent), folder, content_digest(contents))


def _fetched(storage: Storage, path: str, digest: str) -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "synpref_ray" / "fetched" / digest
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache.parent))
        try:
            for file in storage.list_files(path):
                target = temporary / file.removeprefix(f"{path}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.download(file, target)
            temporary.rename(cache)
        except OSError:
            if not cache.exists():
                raise
            # another process of this node was first
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return str(cache)


def store_model(storage: Storage, name: str, folder: str) -> None:
    """Bring a finished local folder into the workspace; the record is written last, as a seal.

    Raises:
        SynprefError: the folder holds no config or no weights: the training process wrote them to a disk that this process does not see.
    """
    if not (Path(folder) / "config.json").is_file() or not any(Path(folder).glob("*.safetensors")):
        raise SynprefError(f"{folder} holds no model to store: the first training worker must run where the driver sees the files that it writes")
    target = f"models/{name}"
    if storage.is_local:
        local = storage.local_path(target)
        os.makedirs(os.path.dirname(local), exist_ok=True)
        if os.path.exists(local):
            shutil.rmtree(local)
        os.rename(folder, local)
        return
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for file in sorted(files, key=lambda path: path.name == RECORD_FILE):
        storage.upload(file, f"{target}/{file.relative_to(folder).as_posix()}")


def model_is_stored(storage: Storage, name: str) -> bool:
    """Whether a finished model of that name is there."""
    return storage.exists(f"models/{name}/{RECORD_FILE}")
