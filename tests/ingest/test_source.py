"""Finding a source's files: order, what is passed over, and what is an error."""

from pathlib import Path

import fsspec
import pytest

from synpref_ray.config import load_config
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.ingest.source import FileFormat, Route, SourceConfig, check_source_names, list_source_files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_of(path: Path | str, root: Path, declared: FileFormat = FileFormat.AUTO) -> list[str]:
    files = list_source_files(SourceConfig(name="s", path=str(path), format=declared))
    return [str(Path(file).relative_to(root)) for file in files]


def test_a_folder_is_read_by_path_and_only_pair_files_count(tmp_path: Path) -> None:
    touch(tmp_path, "b.jsonl", "a/z.parquet", "a/y.JSONL.GZ", "LICENSE", "c.json", "_tmp/x.parquet", ".x.jsonl", "a/_y.jsonl", "B.ndjson")
    assert names_of(tmp_path, tmp_path) == ["B.ndjson", "a/y.JSONL.GZ", "a/z.parquet", "b.jsonl"]
    assert names_of(tmp_path, tmp_path, FileFormat.PARQUET) == ["a/z.parquet"]
    assert names_of(tmp_path, tmp_path, FileFormat.JSONL) == ["B.ndjson", "a/y.JSONL.GZ", "b.jsonl", "c.json"]


def test_patterns_and_single_files(tmp_path: Path) -> None:
    touch(tmp_path, "x=1/train.parquet", "x=2/train.parquet", "x=2/test.parquet", "odd[1].jsonl")
    assert names_of(tmp_path / "*" / "train.parquet", tmp_path) == ["x=1/train.parquet", "x=2/train.parquet"]
    assert names_of(tmp_path / "**" / "*.parquet", tmp_path) == ["x=1/train.parquet", "x=2/test.parquet", "x=2/train.parquet"]
    assert names_of(tmp_path / "odd[1].jsonl", tmp_path) == ["odd[1].jsonl"]


def test_urls_stay_urls() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/pairs/b.jsonl", b"")
    filesystem.pipe("/pairs/a.jsonl", b"")
    assert list_source_files(SourceConfig(name="s", path="memory://pairs")) == ("memory:///pairs/a.jsonl", "memory:///pairs/b.jsonl")


def test_nothing_there(tmp_path: Path) -> None:
    touch(tmp_path, "LICENSE")
    for path in (tmp_path / "absent.parquet", tmp_path / "*.parquet", tmp_path / "absent" / "**"):
        with pytest.raises(InputError, match="source 's': found no file at"):
            names_of(path, tmp_path)
    with pytest.raises(InputError, match=r"none of the 1 files at .* is a Parquet or JSONL file by its name"):
        names_of(tmp_path, tmp_path)
    with pytest.raises(InputError, match="cannot list nosuch://x"):
        names_of("nosuch://x", tmp_path)


def test_source_names_are_unique() -> None:
    one, other = (SourceConfig(name=name, path="x") for name in ("a", "b"))
    check_source_names([one, other])
    with pytest.raises(InputError, match="two sources are called 'a'"):
        check_source_names([one, other, one])


def test_configs_are_declarative() -> None:
    source = load_config(SourceConfig, None, ["name=a", "path=x", "route=seed", "columns.prompt=question", "label_kind=human"])
    assert (source.route, source.columns.prompt, source.columns.chosen) == (Route.SEED, "question", "chosen")
    with pytest.raises(ConfigError, match="route"):
        load_config(SourceConfig, None, ["name=a", "path=x", "route=gold"])
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(SourceConfig, None, ["name=a", "path=x", "colunms.prompt=q"])
