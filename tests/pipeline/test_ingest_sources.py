"""How files under `data` become sources: by their path below it, however `data` is written."""

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from synpref_ray.ingest.source import Route
from synpref_ray.pipeline.ingest import run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig, resolve_sources
from synpref_ray.reporting.run import Run
from synpref_ray.tables.leases import Lease

FILES = {"seed-a.jsonl": Route.SEED, "unverified/b.jsonl": Route.UNVERIFIED, "wild.jsonl": Route.WILD, "x/seed.jsonl": Route.WILD}


def touch(folder: Path) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def routes(data: str) -> dict[str, Route]:
    return {source.name: source.route for source in resolve_sources(IngestConfig(data=data))}


@pytest.mark.parametrize(
    ("data", "below"),
    [
        ("./pairs", "."),
        ("pairs", "."),
        ("pairs/", "."),
        ("./pairs/../pairs", "."),
        (".", "pairs"),
        ("..", "pairs/x"),
        ("~/pairs", "/"),
    ],
)
def test_sources_are_named_below_data_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, below: str) -> None:
    home = tmp_path / "pairs" / "seed"  # the name `pairs` comes twice in the path, and `seed` above the data decides nothing
    touch(home / "pairs")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / below)
    assert routes(data) == FILES
    assert routes(str(home / "pairs")) == FILES
    assert routes(f"file://{home}/pairs") == FILES


def test_patterns_and_single_files_are_named_below_the_folder_they_start_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "odd[1]")
    touch(tmp_path / "pairs")
    monkeypatch.chdir(tmp_path)
    assert routes("pairs/*.jsonl") == {"seed-a.jsonl": Route.SEED, "wild.jsonl": Route.WILD}
    assert routes("./pairs/*/*.jsonl") == {"unverified/b.jsonl": Route.UNVERIFIED, "x/seed.jsonl": Route.WILD}
    assert routes("pairs/seed-a.jsonl") == {"seed-a.jsonl": Route.SEED}
    assert routes("odd[1]") == FILES
    assert routes("odd[1]/seed-a.jsonl") == {"seed-a.jsonl": Route.SEED}


def test_object_storage_is_named_like_a_folder() -> None:
    fsspec.filesystem("memory").pipe({"/source-names/seed/a.jsonl": b"", "/source-names/b.jsonl": b""})
    assert routes("memory://source-names") == {"seed/a.jsonl": Route.SEED, "b.jsonl": Route.WILD}


def test_what_another_driver_ingested_meanwhile_is_not_ingested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.jsonl").write_text('{"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}\n')
    config = IngestConfig(data=str(tmp_path / "data"), workspace=str(tmp_path / "ws"))
    enter: Callable[[Lease], Lease] = Lease.__enter__
    runs = [Run(config.storage, name, config) for name in ("first", "second")]

    def enter_late(lease: Lease) -> Lease:
        monkeypatch.setattr(Lease, "__enter__", enter)
        run_ingest(config, runs[0])
        return enter(lease)

    monkeypatch.setattr(Lease, "__enter__", enter_late)
    run_ingest(config, runs[1])
    assert runs[0].metrics["pools"] == runs[1].metrics["pools"] == {"seed": 1}
    assert os.listdir(tmp_path / "ws" / "pools" / "seed" / "versions") == ["0.json"]
