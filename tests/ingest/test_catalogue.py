"""The catalogue: every row is valid, counted as confirmed or not, documented, and reads a fixture in its published schema."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.config import load_config
from synpref_ray.errors import ConfigError
from synpref_ray.ingest.catalogue import CatalogueRow, catalogue, sources_table, with_catalogue
from synpref_ray.ingest.chunk import Chunk, count_reasons
from synpref_ray.ingest.readers import read_pair_file
from synpref_ray.ingest.source import FileFormat, LabelKind, Route, SourceConfig
from synpref_ray.pipeline.ingest_sources import IngestConfig

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
NUM_ROWS, NUM_CONFIRMED = 61, 44


def read(name: str, file: Path, form: FileFormat = FileFormat.JSONL) -> list[Chunk]:
    source = with_catalogue(SourceConfig(name=name, catalogue=name, path=str(file), format=form))
    return list(read_pair_file(str(file), source))


def pairs_of(chunks: list[Chunk]) -> list[dict[str, Any]]:
    return [pair for chunk in chunks for pair in chunk.pairs.drop_columns(["file", "num_bytes"]).to_pylist()]


def reasons_of(chunks: list[Chunk]) -> dict[str, int]:
    return count_reasons(pa.concat_tables([chunk.rejects for chunk in chunks]))


def test_rows_are_counted_and_so_are_the_unconfirmed(capsys: pytest.CaptureFixture[str]) -> None:
    confirmed = [row for row in catalogue().values() if row.confirmed]
    with capsys.disabled():
        print(f"\ncatalogue: {len(catalogue())} sources, {len(confirmed)} confirmed, {len(catalogue()) - len(confirmed)} not")  # noqa: T201  # asked for
    assert (len(catalogue()), len(confirmed)) == (NUM_ROWS, NUM_CONFIRMED)
    for row in confirmed:  # a page, or a repository and a file in it; never a bare word
        assert re.fullmatch(r"https://[^ ]+|github\.com/[^/ ]+/[^/ ]+: [^ ]+\.[a-z]+", row.confirmed), row.name


def test_routes_follow_the_labels() -> None:
    rows = catalogue().values()
    assert [row.name for row in rows if row.route is Route.SEED] == ["skywork_80k"]
    assert all((row.route is Route.UNVERIFIED) == (row.label_kind is LabelKind.HUMAN) for row in rows if row.route is not Route.SEED)
    with pytest.raises(ValueError, match="only originally human-labelled sets"):
        CatalogueRow.model_validate({**catalogue()["nectar"].model_dump(), "route": "unverified"})


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_a_row_reads_its_fixture(name: str) -> None:
    chunks = read(name, FIXTURES / f"{name}.jsonl")
    expected = EXPECTED[name]
    pairs = pairs_of(chunks)
    assert sum(chunk.num_rows_read for chunk in chunks) == expected["rows"]
    assert (len(pairs), reasons_of(chunks)) == (expected["pairs"], expected["rejected"])
    if "first" in expected:
        first = pairs[0]
        assert [first["prompt"][0]["content"], first["chosen"], first["rejected"]] == expected["first"]
    row = catalogue()[name]
    assert all(pair["source_id"] is not None for pair in pairs) or not row.source_id
    assert all(pair["source"] == name for pair in pairs)


@pytest.mark.parametrize("name", ["helpsteer", "helpsteer2", "helpsteer2_preference"])
def test_the_turns_of_helpsteer_prompts_are_told_apart(name: str) -> None:
    pair = pairs_of(read(name, FIXTURES / f"{name}.jsonl"))[-1]
    assert [(turn["role"], turn["content"]) for turn in pair["prompt"]] == [
        ("user", "Hi, I cook."),
        ("assistant", "Good. What?\n\nSoup?"),
        ("user", "Bread."),
    ]
    assert (pair["chosen"], pair["rejected"]) == ("Then start with flour.", "No.")


@pytest.mark.parametrize("name", sorted(name for name, row in catalogue().items() if row.format is FileFormat.PARQUET))
def test_parquet_copies_read_the_same(name: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    chunks, expected = read(name, tmp_path / "a.parquet", FileFormat.PARQUET), read(name, FIXTURES / f"{name}.jsonl")
    assert (pairs_of(chunks), reasons_of(chunks)) == (pairs_of(expected), reasons_of(expected))


def test_every_fixture_belongs_to_a_row() -> None:
    assert {file.stem for file in FIXTURES.glob("*.jsonl")} == set(catalogue()) == set(EXPECTED)


def test_the_documentation_has_the_table() -> None:
    assert sources_table() in (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")


def test_the_config_of_all_sources_lists_each_with_its_route() -> None:
    config = load_config(IngestConfig, str(ROOT / "jobs" / "configs" / "ingest_synpref.yaml"), [])
    assert [(source.name, source.route) for source in config.sources] == [(row.name, row.route) for row in catalogue().values()]


def test_a_source_is_filled_from_the_row_of_its_name_or_the_one_it_names() -> None:
    filled = with_catalogue(SourceConfig(name="helpsteer3"))
    assert (filled.route, filled.label_kind, filled.licence, filled.catalogue) == (Route.UNVERIFIED, LabelKind.HUMAN, "cc-by-4.0", "helpsteer3")
    assert filled.adapter == catalogue()["helpsteer3"].adapter
    part = with_catalogue(SourceConfig(name="hh-online", catalogue="hh_rlhf", path="x", route=Route.WILD, licence="mine"))
    assert (part.name, part.route, part.licence, part.adapter) == ("hh-online", Route.WILD, "mine", catalogue()["hh_rlhf"].adapter)
    mine = SourceConfig.model_validate({"name": "nectar", "path": "x", "columns": {"prompt": "question"}})
    assert with_catalogue(mine) is mine
    own = SourceConfig(name="nectar", path="x")  # a file of one's own that happens to be called like a row
    assert with_catalogue(own) is own
    named = with_catalogue(SourceConfig(name="nectar", catalogue="nectar", path="x"))
    assert (named.path, named.adapter) == ("x", catalogue()["nectar"].adapter)
    other = SourceConfig(name="other", path="x")
    assert with_catalogue(other) is other
    with pytest.raises(ConfigError, match="the catalogue has no row 'nectarine'"):
        with_catalogue(SourceConfig(name="a", catalogue="nectarine", path="x"))


def test_rows_of_a_data_set_with_several_splits_name_their_files() -> None:
    rows = catalogue().values()
    assert all(row.hub.files for row in rows if (row.hub.config or row.hub.split != "train") and not row.where)
