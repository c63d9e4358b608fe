"""Files by folder and pattern: a folder that cannot be listed is an error, never an empty one; what fsspec finds otherwise is found."""

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from synpref_ray.errors import InputError
from synpref_ray.ingest.source import SourceConfig, list_source_files
from synpref_ray.tables.files import Files, find_files
from synpref_ray.tables.storage import Storage


class LockedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """In memory; nobody may look into folders that are called `locked`."""

    protocol = "locked"

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self._refuse(path)
        return super().ls(path, detail=detail, **more)

    def info(self, path: str, **more: Any) -> Any:
        self._refuse(path.rpartition("/")[0])
        return super().info(path, **more)

    def _refuse(self, path: str) -> None:
        if "locked" in self._strip_protocol(path).split("/"):
            raise PermissionError(f"{path}: access denied")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("locked://", "memory://")))


@pytest.fixture
def root() -> str:
    fsspec.register_implementation("locked", LockedFileSystem, clobber=True)
    fs, name = LockedFileSystem(), f"/{uuid.uuid4().hex}"
    for file in ("open/a.jsonl", "open/locked/b.jsonl"):
        fs.pipe_file(f"{name}/{file}", b"{}")
    return f"locked:/{name}"


def test_a_folder_that_cannot_be_listed_is_an_error(root: str) -> None:
    storage = Storage(root)
    for look in (storage.list_files, storage.sizes):
        with pytest.raises(PermissionError, match="access denied"):
            look("open")
    with pytest.raises(PermissionError, match="access denied"):
        storage.exists("open/locked/b.jsonl")
    assert storage.list_files("open", deep=False) == ["open/a.jsonl"]
    assert (storage.list_files("none"), storage.sizes("none"), storage.exists("none")) == ([], {}, False)
    assert [file.rpartition("/")[2] for file in find_files(f"{root}/open/*.jsonl").files] == ["a.jsonl"]
    for path in ("open", "open/**/*.jsonl", "*/*/*.jsonl"):
        with pytest.raises(InputError, match=r"source 's': cannot list .* access denied"):
            list_source_files(SourceConfig(name="s", path=f"{root}/{path}"))


@pytest.mark.parametrize(
    "pattern", ["*", "*.jsonl", "a/*", "a/?.jsonl", "*/*.jsonl", "**/*.jsonl", "**", "a/**", "a/[xy].json*", "none/*", "a/*/*/*"]
)
def test_patterns_mean_what_they_mean_in_fsspec(tmp_path: Path, pattern: str) -> None:
    for name in ("top.jsonl", "a/x.jsonl", "a/y.json", "a/b/z.jsonl", "a/b/c/deep.jsonl", "d/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "a" / "link.jsonl").symlink_to(tmp_path / "top.jsonl")
    (tmp_path / "e").symlink_to(tmp_path / "a")
    fs = LocalFileSystem()
    assert find_files(f"{tmp_path}/{pattern}").files == [file for file in fs.glob(f"{tmp_path}/{pattern}") if fs.isfile(file)]
    assert find_files(str(tmp_path)).files == fs.find(str(tmp_path))
    files = Files(fs, str(tmp_path))
    assert files.list_files("a/x.jsonl") == ["a/x.jsonl"]
    assert files.list_files("a/x.jsonl/none") == []
    assert not files.exists("a/x.jsonl/none")
