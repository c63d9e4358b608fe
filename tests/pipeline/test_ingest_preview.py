"""`ingest --dry-run` opens what it would read, says what the first rows give, and refuses what gives nothing; files passed over are named."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import ingest
from synpref_ray.ingest.readers import LOOK_ROWS, read_first_rows
from synpref_ray.ingest.source import SourceConfig

PAIR = {"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}
WRONG = {"question": "Hi?", "a": "Hi.", "b": "No."}


def write_lines(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def dry_run(capsys: pytest.CaptureFixture[str], folder: Path, *settings: str) -> tuple[int, str, str]:
    code = ingest.main([f"workspace={folder / 'ws'}", *settings, "--dry-run"])
    said = capsys.readouterr()
    assert not (folder / "ws").exists()
    return code, said.out, said.err


def test_what_the_first_rows_give_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "seed.jsonl", [{**PAIR, "prompt": str(number)} for number in range(LOOK_ROWS + 50)])
    write_lines(tmp_path / "data" / "odd.jsonl", ["{broken", PAIR, {**PAIR, "chosen": ""}])
    pq.write_table(pa.Table.from_pylist([PAIR] * 3), tmp_path / "data" / "unverified.parquet")
    (tmp_path / "data" / "more.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    (tmp_path / "data" / ".hidden.csv").write_text("x")
    code, out, _ = dry_run(capsys, tmp_path, f"data={tmp_path / 'data'}")
    assert code == 0
    assert [line.split() for line in out.splitlines()[2:5]] == [
        ["odd.jsonl", "wild", "1", "3", "1", "1", "empty_reply,", "1", "invalid_json"],
        ["seed.jsonl", "seed", "1", str(LOOK_ROWS), str(LOOK_ROWS)],
        ["unverified.parquet", "unverified", "1", "3", "3"],
    ]
    assert "passed over by name: more.csv; for CSV and JSON arrays declare a source with its format" in out
    assert out.endswith("ingest: config and inputs are valid\n")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wrong.jsonl", "", "lacks the columns prompt, chosen, rejected; found: a, b, question"),
        ("wrong.parquet", "", "lacks the columns prompt, chosen, rejected; found: a, b, question"),
        ("wrong.csv", "format: csv", "the first 3 rows of .* give not one pair .3 missing_field.; see the formats"),
        ("wrong.jsonl", "adapter: {kind: comparison, a: x, b: b, verdict: {by: strength, strength: s}}", "give not one pair"),
        ("cut.parquet", "", "is not a complete Parquet file"),
        ("empty.jsonl", "", "is empty"),
        ("text.jsonl", "", "the first 2 rows of .* give not one pair .2 invalid_json."),
    ],
)
def test_what_gives_no_pair_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, settings: str, message: str) -> None:
    write_lines(tmp_path / "wrong.jsonl", [WRONG] * 3)
    pq.write_table(pa.Table.from_pylist([WRONG] * 3), tmp_path / "wrong.parquet")
    (tmp_path / "wrong.csv").write_text("question,a,b\n" + "x,y,z\n" * 3)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "wrong.parquet").read_bytes()[:-20])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    write_lines(tmp_path / "text.jsonl", ["no", "JSON"])
    code, _, error = dry_run(capsys, tmp_path, f"sources=[{{name: mine, path: {tmp_path / name}, {settings}}}]")
    assert (code, error.count("\n")) == (2, 1)
    assert re.search(message, error), error


def test_rows_that_say_nothing_about_the_format_are_no_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_lines(tmp_path / "ties.jsonl", [{"prompt": "q", "a": "x", "b": "y", "s": 0}] * 5)
    adapter = "{kind: comparison, a: a, b: b, verdict: {by: strength, strength: s}}"
    code, out, _ = dry_run(capsys, tmp_path, f"sources=[{{name: mine, path: {tmp_path / 'ties.jsonl'}, adapter: {adapter}}}]")
    assert code == 0
    assert "5 tied" in out


def test_no_more_than_the_first_rows_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "many.jsonl", [PAIR] * 20)
    pq.write_table(pa.Table.from_pylist([PAIR] * 20), tmp_path / "many.parquet", row_group_size=5)
    adapter = {"kind": "rated_rows", "reply": "chosen", "scores": ["x"], "span": "file"}
    for name, more in (("many.jsonl", {}), ("many.parquet", {}), ("many.jsonl", {"adapter": adapter})):
        source = SourceConfig.model_validate({"name": "mine", "path": str(tmp_path / name), **more})
        assert sum(chunk.num_rows_read for chunk in read_first_rows(source.path, source, max_rows=4)) == 4
