"""Model folders under the workspace: made whole, found by name, and brought to the local disk of whoever loads them.

A model lives at `models/<name>/`. Libraries load from local paths, so on object storage a folder is fetched once per node into the user's cache.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from synpref_ray.errors import SynprefError
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
        if self.storage.is_local:
            return self.storage.local_path(self.path)
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "synpref_ray" / "fetched" / self.digest
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=cache.parent))
            for path in self.storage.list_files(self.path):
                target = temporary / path.removeprefix(f"{self.path}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.storage.read_bytes(path))
            try:
                temporary.rename(cache)
            except OSError:  # another process of this node was first
                shutil.rmtree(temporary)
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
        storage.write_bytes(f"{target}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def model_is_stored(storage: Storage, name: str) -> bool:
    """Whether a finished model of that name is there."""
    return storage.exists(f"models/{name}/{RECORD_FILE}")
