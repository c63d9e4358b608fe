"""Imported verdicts: three formats agree, majorities by hand, and every bad line is one clear error."""

import csv
import json
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.human.verdict_file import VerdictImportReport, import_verdicts, settle
from synpref_ray.schema import HUMAN_SCHEMA, Verdict

LINES = [
    ("a", "chosen", "ann"),
    ("b", "rejected", "ann"),
    ("c", "chosen", "ann"),
    ("c", "rejected", "bob"),
    ("a", "rejected", "bob"),
    ("a", "chosen", "eve"),
    ("d", "undecidable", "bob"),
    ("x", "chosen", "bob"),
    ("b", "chosen", "ann"),  # Ann changed her mind
]
SHARD = pa.table({"pair_id": ["d", "c", "b", "a", "e"]})


def write(path: Path, lines: list[tuple[str, str, str]]) -> str:
    rows = [dict(zip(("pair_id", "verdict", "annotator"), line, strict=True)) for line in lines]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["annotator", "pair_id", "verdict"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("name", ["v.parquet", "v.jsonl", "v.csv"])
def test_every_format(tmp_path: Path, name: str) -> None:
    imported = import_verdicts(write(tmp_path / name, LINES))
    verdicts = imported.verify(SHARD, ["a", "b", "d", "e"])
    assert verdicts.schema == HUMAN_SCHEMA
    assert [(row["pair_id"], row["human_verdict"], row["annotator"], row["simulated"], row["drop_reason"]) for row in verdicts.to_pylist()] == [
        ("d", "abstain", "bob", False, "undecidable"),
        ("c", None, None, None, "not_selected"),
        ("b", "chosen", "ann", False, None),
        ("a", "chosen", "ann, bob, eve", False, None),
        ("e", None, None, None, "not_selected"),  # selected, but nobody has answered yet
    ]
    assert imported.report({"a", "b", "c", "d", "e"}) == VerdictImportReport(
        num_lines=9, num_pairs=5, num_undecidable=2, num_unknown=1, unknown_examples=("x",)
    )


@pytest.mark.parametrize(
    ("votes", "verdict"),
    [
        ("c", "chosen"),
        ("ccr", "chosen"),
        ("crr", "rejected"),
        ("cr", "abstain"),
        ("ccrr", "abstain"),
        ("cu", "abstain"),
        ("ccu", "chosen"),
        ("ccru", "abstain"),  # two of four are no majority
        ("uur", "abstain"),
    ],
)
def test_majority(votes: str, verdict: str) -> None:
    meanings = {"c": Verdict.CHOSEN, "r": Verdict.REJECTED, "u": Verdict.ABSTAIN}
    assert settle({str(place): meanings[vote] for place, vote in enumerate(votes)}).verdict == verdict


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.sampled_from(list(Verdict)), min_size=1, max_size=7), st.randoms())
def test_neither_order_nor_side_matters(votes: dict[str, Verdict], random: Random) -> None:
    shuffled = random.sample(sorted(votes), len(votes))
    assert settle({name: votes[name] for name in shuffled}) == settle(votes)
    swapped = {Verdict.CHOSEN: Verdict.REJECTED, Verdict.REJECTED: Verdict.CHOSEN, Verdict.ABSTAIN: Verdict.ABSTAIN}
    assert settle({name: swapped[verdict] for name, verdict in votes.items()}).verdict is swapped[settle(votes).verdict]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.csv", "pair_id,verdict\na,chosen\n", "lacks the column annotator; found: pair_id, verdict"),
        ("v.csv", "", "lacks the column pair_id, verdict, annotator; found: none"),
        ("v.csv", "pair_id,verdict,annotator\na,better,ann\n", "row 1: verdict 'better'; expected chosen, rejected, undecidable"),
        ("v.csv", "pair_id,verdict,annotator\na,chosen,ann\nb,chosen\n", "row 2: expected a text in annotator, found nothing"),
        ("v.csv", "pair_id,verdict,annotator\n,chosen,ann\n", "row 1: expected a text in pair_id, found an empty one"),
        ("v.jsonl", '{"pair_id": "a"', "row 1: not a line of JSON"),
        ("v.jsonl", "[1]", "row 1: expected an object, found list"),
        ("v.jsonl", '\n{"pair_id": "a", "verdict": "chosen"}', "row 2, lacks the column annotator"),
        ("v.jsonl", '{"pair_id": 7, "verdict": "chosen", "annotator": "ann"}', "row 1: expected a text in pair_id, found int"),
        ("v.jsonl", b"\xff", "is not UTF-8"),
        ("v.parquet", "not parquet", "is not a complete Parquet file"),
        ("v.txt", "a chosen ann", "cannot tell the format"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((InputError, SchemaError)) as caught:
        import_verdicts(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_wrong_parquet_type(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no verdict file"):
        import_verdicts(str(tmp_path / "v.csv"))
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"pair_id": ["a"], "verdict": [1], "annotator": ["ann"]}), path)
    with pytest.raises(InputError, match="row 1: expected a text in verdict, found int"):
        import_verdicts(str(path))
