"""Rows in == pairs + rejects, whatever the rows are; rejects keep the whole row."""

import datetime
import json
from collections.abc import Mapping

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray import schema
from synpref_ray.ingest.chunk import REJECTS_SCHEMA, STAGED_SCHEMA, count_reasons, normalise_rows
from synpref_ray.ingest.source import PairColumns, SourceConfig

UNHURRIED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SOURCE = SourceConfig(name="mine", path="nowhere")

TEXT = st.sampled_from(["", " ", "a", "b", "é", "q\n"])
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.one_of(TEXT, st.none(), st.just(3))})
VALUE = st.one_of(
    TEXT, st.none(), st.integers(), st.lists(MESSAGE, max_size=4), st.lists(TEXT, max_size=2), st.just({"role": "user", "content": "x"})
)
ROW = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "pair_id", "other"]), VALUE)


@UNHURRIED
@given(st.lists(ROW, max_size=12), st.integers(0, 5))
def test_every_row_is_a_pair_or_a_reject(rows: list[dict[str, object]], first_row: int) -> None:
    chunk = normalise_rows(rows, SOURCE, file="f", first_row=first_row)
    assert chunk.num_rows_read == len(rows)
    assert chunk.pairs.schema == STAGED_SCHEMA
    assert chunk.rejects.schema == REJECTS_SCHEMA
    chunk.pairs.validate(full=True)
    chunk.rejects.validate(full=True)
    numbers = chunk.pairs["row"].to_pylist() + chunk.rejects["row"].to_pylist()
    assert sorted(numbers) == list(range(first_row, first_row + len(rows)))
    for reject in chunk.rejects.to_pylist():
        assert json.loads(reject["row_json"]) == rows[reject["row"] - first_row]
    for pair in chunk.pairs.to_pylist():
        row = rows[pair["row"] - first_row]
        assert pair["pair_id"] == schema.pair_id(pair["prompt"], pair["chosen"], pair["rejected"])
        if isinstance(row["chosen"], str):
            assert pair["chosen"] == row["chosen"]


@UNHURRIED
@given(st.lists(ROW, max_size=12), st.integers(1, 5))
def test_chunk_borders_change_nothing(rows: list[dict[str, object]], size: int) -> None:
    whole = normalise_rows(rows, SOURCE)
    pieces = [normalise_rows(rows[start : start + size], SOURCE, first_row=start) for start in range(0, len(rows), size)]
    assert [row for piece in pieces for row in piece.pairs.to_pylist()] == whole.pairs.to_pylist()
    assert [row for piece in pieces for row in piece.rejects.to_pylist()] == whole.rejects.to_pylist()


def one_row(row: Mapping[str, object], source: SourceConfig = SOURCE) -> dict[str, object]:
    (pair,) = normalise_rows([{"prompt": "q", "chosen": "a", "rejected": "b", **row}], source).pairs.to_pylist()
    return dict(pair)


def test_own_ids_are_kept_as_source_id() -> None:
    assert one_row({"pair_id": "x7"})["source_id"] == "x7"
    assert one_row({"source_id": None, "id": 12})["source_id"] == "12"
    assert one_row({"source_id": "s", "pair_id": "p"})["source_id"] == "s"
    assert one_row({"id": {"b": 1, "a": "é"}})["source_id"] == '{"b": 1, "a": "é"}'
    assert one_row({})["source_id"] is None
    no_ids = SourceConfig(name="mine", path="nowhere", columns=PairColumns(source_id=()))
    assert one_row({"pair_id": "x7"}, no_ids)["source_id"] is None


def test_columns_are_mapped() -> None:
    columns = PairColumns(prompt="question", chosen="best", rejected="worst")
    source = SourceConfig(name="mine", path="nowhere", columns=columns)
    (pair,) = normalise_rows([{"question": "q", "best": "a", "worst": "b", "chosen": 3}], source).pairs.to_pylist()
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([{"role": "user", "content": "q"}], "a", "b")
    assert (pair["source"], pair["contradicted"]) == ("mine", False)


def test_values_that_json_does_not_know_are_kept_in_rejects() -> None:
    row = {"prompt": "q", "chosen": "", "rejected": "b", "raw": b"\xff\x00", "day": datetime.date(2025, 7, 2), "half": "\ud800"}
    rejects = normalise_rows([row], SOURCE).rejects
    assert count_reasons(rejects) == {"empty_reply": 1}
    kept = json.loads(rejects["row_json"][0].as_py())
    assert kept == {**row, "raw": {"base64": "/wA="}, "day": "2025-07-02"}


def test_half_a_surrogate_pair_is_a_reject_wherever_it_stands() -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", name: "\udc00"} for name in ("prompt", "chosen", "rejected", "id")]
    assert count_reasons(normalise_rows(rows, SOURCE).rejects) == {"invalid_utf8": 4}


def test_num_bytes_bounds_the_size_in_memory() -> None:
    rows = [{"prompt": [{"role": "user", "content": "é" * n}], "chosen": "a" * n, "rejected": "b", "id": n} for n in range(1, 200)]
    pairs = normalise_rows(rows, SOURCE).pairs
    size = pairs.select(schema.POOL_SCHEMA.names).nbytes
    total = sum(pairs["num_bytes"].to_pylist())
    assert size <= total <= 3 * size
