"""Rows of every format as plain values: what is read, what is refused with a reason, and files that are one clear error."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.errors import InputError
from synpref_ray.ingest.readers import read_file_rows, read_pair_file
from synpref_ray.ingest.source import FileFormat, SourceConfig, list_source_files

ROWS: list[dict[str, Any]] = [
    {"prompt": "q, with a comma", "chosen": "line\nbreak", "rejected": 'a "quote"'},
    {"prompt": "r", "chosen": "x", "rejected": "é"},
]


def csv_text(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def write(folder: Path, form: FileFormat) -> Path:
    path = folder / f"a.{form.value}"
    if form is FileFormat.PARQUET:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif form is FileFormat.CSV:
        path.write_bytes(csv_text([list(ROWS[0]), *(list(row.values()) for row in ROWS)]))
    elif form is FileFormat.JSON:
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", [form for form in FileFormat if form is not FileFormat.AUTO])
@pytest.mark.parametrize("packed", [False, True])
def test_formats_agree(tmp_path: Path, form: FileFormat, packed: bool) -> None:
    path = write(tmp_path, form)
    if packed and form is not FileFormat.PARQUET:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.values for row in read_file_rows(str(path), form)] == ROWS
    (chunk,) = read_pair_file(str(path), SourceConfig(name="mine", path=str(path), format=form))
    assert [[pair["chosen"], pair["rejected"]] for pair in chunk.pairs.to_pylist()] == [[row["chosen"], row["rejected"]] for row in ROWS]


def test_folders_are_read_by_the_declared_format(tmp_path: Path) -> None:
    for name in ("a.json", "b.csv", "c.csv.gz", "d.jsonl", "e.parquet"):
        (tmp_path / name).touch()
    found = {
        form: [Path(file).name for file in list_source_files(SourceConfig(name="s", path=str(tmp_path), format=form))] for form in ("json", "csv")
    }
    assert found == {"json": ["a.json"], "csv": ["b.csv", "c.csv.gz"]}


def test_rows_that_cannot_be_read_are_told_apart(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"a": 1}\n\xff\n{"a"\n[1]\n' + b"[" * 100_000 + b"\n")
    assert [row.reason and row.reason.value for row in read_file_rows(str(lines), FileFormat.JSONL)] == [
        None,
        "invalid_utf8",
        "invalid_json",
        "wrong_type",
        "invalid_json",
    ]
    table = tmp_path / "a.csv"
    table.write_bytes(csv_text([["a", "b"], ["1", "2"], ["1"], ["1", "2", "3"]]))
    rows = list(read_file_rows(str(table), FileFormat.CSV))
    assert [row.reason and row.reason.value for row in rows] == [None, "missing_field", "wrong_type"]
    assert json.loads(rows[1].text) == {"a": "1"}
    array = tmp_path / "a.json"
    array.write_text('[{"a": 1}, 3, null]')
    assert [row.reason and row.reason.value for row in read_file_rows(str(array), FileFormat.JSON)] == [None, "wrong_type", "wrong_type"]


def test_csv_text_that_is_no_utf8_is_refused_by_its_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,chosen,rejected\nq,\xff,b\nq,a,b\n")
    (chunk,) = read_pair_file(str(path), SourceConfig(name="mine", path=str(path), format=FileFormat.CSV))
    assert (chunk.pairs.num_rows, chunk.rejects["reason"].to_pylist()) == (1, ["invalid_utf8"])


def test_parquet_rows_with_text_that_is_no_utf8(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"a": texts}), tmp_path / "a.parquet")
    rows = list(read_file_rows(str(tmp_path / "a.parquet"), FileFormat.PARQUET))
    assert [(row.number, row.reason and row.reason.value) for row in rows] == [(0, None), (1, "invalid_utf8")]
    assert json.loads(rows[1].text) == {"a": {"base64": "/w=="}}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", "not a complete JSON array"),
        ("a.json", b"[1", "not a complete JSON array"),
        ("a.json", b'{"a": 1}', "holds dict where a JSON array"),
        ("a.json", gzip.compress(b"[1]")[:-6], "not a complete JSON array"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b'a,b\n"open', "truncated or no CSV"),
        ("a.csv", gzip.compress(b"a,b\n1,2\n")[:-6], "truncated or no CSV"),
        ("a.jsonl", b"", "is empty"),
        ("a.parquet", b"PAR1", "not a complete Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(read_file_rows(str(tmp_path / name), FileFormat(name.split(".")[1])))
