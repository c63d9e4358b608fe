"""A model card's licences come from the ingest record of the pools; what a config says stands, and what nobody stated stays unstated."""

import json
from pathlib import Path

import pytest

from synpref_ray.ingest.accounts import normalise_licence
from synpref_ray.ingest.source import SourceConfig
from synpref_ray.pipeline.export import ExportConfig
from synpref_ray.pipeline.ingest import run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.reporting.run import Run
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.tables.storage import Storage

LICENCES = {"first": "cc-by-4.0", "second": "mit", "third": ""}


def test_a_corrected_licence_reaches_the_record_without_new_pools(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "yes", "rejected": "no"}) + "\n")
    storage = Storage(str(tmp_path / "ws"))

    def ingest(licence: str, kind: str) -> tuple[str, Run]:
        source = {"name": "a", "path": str(tmp_path / "a.jsonl"), "licence": licence, "label_kind": kind}
        config = IngestConfig.model_validate({"workspace": str(tmp_path / "ws"), "sources": [source]})
        run = Run(storage, "ingest", config)
        return run_ingest(config, run), run

    first, _ = ingest(" MIT ", "ai")
    before = {path: (tmp_path / "ws" / path).stat().st_mtime_ns for path in storage.list_files("pools")}
    again, _ = ingest("mit", "ai")
    assert again == first
    assert {path: (tmp_path / "ws" / path).stat().st_mtime_ns for path in storage.list_files("pools")} == before
    table, run = ingest("CC-BY-NC-4.0", "human")
    assert "record corrected, a: licence mit is now cc-by-nc-4.0\nrecord corrected, a: label_kind ai is now human" in table
    assert (run.steps, run.metrics["licences"]) == ([], {"cc-by-nc-4.0": {"pairs": 1, "sources": ["a"]}})
    assert with_source_licences(CardConfig(), storage).source_licences == {"a": "cc-by-nc-4.0"}
    changed = [path for path in storage.list_files("pools") if (tmp_path / "ws" / path).stat().st_mtime_ns != before[path]]
    assert [path.startswith("pools/ingest-") for path in changed] == [True]


@pytest.mark.parametrize("stated", ["", "  ", "Unknown", "OTHER", "N/A", "n-a", "none", "cc"])
def test_words_that_name_no_licence(stated: str) -> None:
    assert normalise_licence(stated) == "unknown"
    assert ExportConfig(set="s", workspace="w", licence_of={"a": stated}).licence_of == {"a": "unknown"}


def test_licences_are_those_that_ingest_recorded(tmp_path: Path) -> None:
    sources = []
    for name, licence in LICENCES.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "chosen": "yes", "rejected": "no"}) + "\n")
        sources.append(SourceConfig(name=name, path=str(tmp_path / f"{name}.jsonl"), licence=licence))
    config = IngestConfig(workspace=str(tmp_path / "ws"), sources=tuple(sources))
    storage = Storage(str(tmp_path / "ws"))
    assert with_source_licences(CardConfig(), storage) == CardConfig()
    run_ingest(config, Run(storage, "ingest", config))
    found = with_source_licences(CardConfig(licence="mit", source_licences={"second": "apache-2.0"}), storage)
    assert found == CardConfig(licence="mit", source_licences={"first": "cc-by-4.0", "second": "apache-2.0"})
