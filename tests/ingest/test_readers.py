"""Pair files: both formats give the same pairs, chunk sizes change nothing, and bad files or rows are one clear line or counted rejects."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.ingest import lines
from synpref_ray.ingest.chunk import Chunk, count_reasons
from synpref_ray.ingest.readers import read_pair_file, read_source
from synpref_ray.ingest.source import FileFormat, PairColumns, SourceConfig

USER = {"role": "user", "content": "q"}
ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": f"question {n}"}], "chosen": f"good {n}", "rejected": f"bad {n}", "pair_id": f"own-{n}"}
    for n in range(23)
]
ROWS[5]["chosen"] = ""
ROWS[9]["rejected"] = ROWS[9]["chosen"]
ROWS[17]["prompt"] = []


def source_of(path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(name="mine", path=str(path), **settings)


def read(path: Path, **settings: Any) -> list[Chunk]:
    return list(read_pair_file(str(path), source_of(path, **settings)))


def rows_of(chunks: list[Chunk]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    pairs = [row for chunk in chunks for row in chunk.pairs.drop_columns(["file"]).to_pylist()]
    rejects = [row for chunk in chunks for row in chunk.rejects.drop_columns(["file"]).to_pylist()]
    return pairs, rejects


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_formats_agree(tmp_path: Path) -> None:
    expected = rows_of(read(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    assert rows_of(read(write_jsonl(tmp_path / "a.jsonl.gz", ROWS))) == expected
    pairs, rejects = rows_of(read(write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=6)))
    assert pairs == expected[0]
    assert [(r["row"], r["reason"], json.loads(r["row_json"])) for r in rejects] == [
        (r["row"], r["reason"], json.loads(r["row_json"])) for r in expected[1]
    ]
    assert [(r["row"], r["reason"]) for r in rejects] == [(5, "empty_reply"), (9, "identical_replies"), (17, "empty_prompt")]
    assert json.loads(rejects[0]["row_json"]) == ROWS[5]
    assert [pair["source_id"] for pair in pairs[:3]] == ["own-0", "own-1", "own-2"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("max_rows", [1, 7])
def test_chunk_sizes_agree(tmp_path: Path, name: str, max_rows: int) -> None:
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, ROWS)
    chunks = list(read_pair_file(str(path), source_of(path), max_rows=max_rows))
    assert rows_of(chunks) == rows_of(read(path))
    assert [chunk.num_rows_read for chunk in chunks] == [min(max_rows, 23 - start) for start in range(0, 23, max_rows)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chunks_keep_to_the_byte_ceiling(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "q", "chosen": f"{n}" + "x" * 1000, "rejected": "no"} for n in range(20)]
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(
        tmp_path / name, rows, **({"compression": "none"} if "parquet" in name else {})
    )
    chunks = list(read_pair_file(str(path), source_of(path), max_bytes=4000))
    assert sum(chunk.pairs.num_rows for chunk in chunks) == 20
    assert max(chunk.pairs.num_rows for chunk in chunks) <= 4


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary", "large_list"])
def test_parquet_column_types(tmp_path: Path, kind: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    field = table.schema.field
    casts = {
        "large_string": {"chosen": pa.large_string(), "rejected": pa.large_string()},
        "string_view": {"chosen": pa.string_view()},
        "dictionary": {"rejected": pa.dictionary(pa.int32(), pa.string())},
        "large_list": {"prompt": pa.large_list(field("prompt").type.value_type)},
    }[kind]
    columns = [table[name].cast(casts.get(name, field(name).type)) for name in table.column_names]
    path = tmp_path / "typed.parquet"
    pq.write_table(pa.table(columns, names=table.column_names), path)
    assert rows_of(read(path)) == rows_of(read(write_parquet(tmp_path / "plain.parquet", ROWS)))


def test_parquet_message_lists_with_nulls(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "yes"}
    other = {"role": "assistant", "content": "no"}
    rows: list[dict[str, Any]] = [
        {"chosen": [USER, reply], "rejected": [USER, other]},
        {"chosen": None, "rejected": [USER, other]},
        {"chosen": [USER, None], "rejected": [USER, other]},
        {"chosen": [], "rejected": [USER, other]},
        {"chosen": [USER, {"role": "assistant", "content": None}], "rejected": [USER, other]},
        {"chosen": [USER, {"role": None, "content": "yes"}], "rejected": [USER, other]},
        {"chosen": [USER, reply], "rejected": [USER, other]},
    ]
    pairs, rejects = rows_of(read(write_parquet(tmp_path / "a.parquet", rows)))
    assert [pair["row"] for pair in pairs] == [0, 6]
    assert pairs[0]["prompt"] == [USER]
    assert [r["reason"] for r in rejects] == ["missing_field", "wrong_type", "empty_reply", "empty_reply", "wrong_type"]


def test_bad_json_lines_are_counted_rejects(tmp_path: Path) -> None:
    good = b'{"prompt": "q", "chosen": "a", "rejected": "b"}'
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b'{"prompt": "q", "chosen": "a\xff", "rejected": "b"}',
        b'{"prompt": "q", "chosen": "a", "rejec',
        b"[1, 2]",
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}',
        b'{"prompt": 5, "chosen": "a", "rejected": "b"}',
        good.replace(b'"a"', b'"c"') + b"\r",
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    pairs, rejects = rows_of(read(path))
    assert [(pair["row"], pair["chosen"]) for pair in pairs] == [(0, "a"), (9, "c")]
    expected = ["invalid_utf8", "invalid_json", "wrong_type", "invalid_json", "invalid_json", "invalid_utf8", "wrong_type"]
    assert [(r["row"], r["reason"]) for r in rejects] == list(zip(range(2, 9), expected, strict=True))
    assert base64.b64decode(json.loads(rejects[0]["row_json"])["base64"]) == lines[2]
    assert [r["row_json"].encode() for r in rejects[1:]] == lines[3:9]


def test_parquet_text_that_is_no_utf8_refuses_its_rows_only(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    table = pa.table({"prompt": ["p", "q", "r"], "chosen": texts, "rejected": ["x", "y", "z"]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    pairs, rejects = rows_of(read(path))
    assert [pair["chosen"] for pair in pairs] == ["a", "c"]
    assert [(r["row"], r["reason"]) for r in rejects] == [(1, "invalid_utf8")]
    assert json.loads(rejects[0]["row_json"]) == {
        "prompt": "q",
        "chosen": {"base64": base64.b64encode(b"\xff\xfe").decode()},
        "rejected": "y",
    }


def test_invalid_utf8_in_another_column_costs_no_pair(tmp_path: Path) -> None:
    notes = pa.array([b"a", b"\xff"]).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["p", "q"], "chosen": ["x", ""], "rejected": ["y", "z"], "note": notes}), path)
    pairs, rejects = rows_of(read(path))
    assert len(pairs) == 1
    assert [r["reason"] for r in rejects] == ["empty_reply"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_missing_column_names_itself(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "q", "chosen": "a", "answer": "b"}] * 3
    path = (write_parquet if "parquet" in name else write_jsonl)(tmp_path / name, rows)
    with pytest.raises(SchemaError, match=r"lacks the column rejected; found: answer, chosen, prompt") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    mapped = read(path, columns=PairColumns(rejected="answer"))
    assert sum(chunk.pairs.num_rows for chunk in mapped) == 3


def test_string_replies_need_a_prompt_column(tmp_path: Path) -> None:
    rows = [{"chosen": "a", "rejected": "b"}]
    for path in (write_parquet(tmp_path / "a.parquet", rows), write_jsonl(tmp_path / "a.jsonl", rows)):
        with pytest.raises(SchemaError, match="lacks the column prompt"):
            read(path)


def test_a_column_missing_from_some_lines_is_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    (chunk,) = read(path)
    assert (chunk.pairs.num_rows, count_reasons(chunk.rejects)) == (1, {"missing_field": 1})


@pytest.mark.parametrize("value", [1, 2.5, True, b"x", ["x"], {"a": 1}])
def test_parquet_column_of_unusable_type(tmp_path: Path, value: object) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "q", "chosen": value, "rejected": "b"}])
    with pytest.raises(SchemaError, match=r"column chosen has type .*; expected a string or a list of role/content messages"):
        read(path)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is not a complete Parquet file"):
        read(path)


def test_parquet_with_a_damaged_page(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[4:300] = b"\xff" * 296
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"a\.parquet is damaged in row group 0"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a complete Parquet file") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_truncated_gzip(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is truncated or damaged after line \d+"):
        read(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    raw = bytearray(path.read_bytes())
    raw[60:70] = b"\x00" * 10
    path.write_bytes(raw)
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


def test_gzip_is_recognised_whatever_the_name(tmp_path: Path) -> None:
    packed = write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    assert rows_of(read(packed.rename(tmp_path / "b.jsonl"))) == rows_of(read(write_jsonl(tmp_path / "c.jsonl", ROWS)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_empty_jsonl(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is empty"):
        read(write_jsonl(tmp_path / name, []))


def test_parquet_without_rows_has_no_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), path)
    assert read(path) == []


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[" + b'{"prompt": "q"},' * 100_000)
    with pytest.raises(InputError, match="line 1 is longer than 1 MiB"):
        read(path)


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read(tmp_path / "a.jsonl")
    path = write_jsonl(tmp_path / "a.json", ROWS)
    with pytest.raises(InputError, match="cannot tell the format"):
        read(path)
    assert sum(chunk.num_rows_read for chunk in read(path, format=FileFormat.JSONL)) == 23


def test_a_source_reads_its_files_in_order_from_any_file_system(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[:2])
    write_parquet(tmp_path / "a.parquet", ROWS[2:4])
    local = rows_of(list(read_source(source_of(tmp_path))))
    assert [pair["source_id"] for pair in local[0]] == ["own-2", "own-3", "own-0", "own-1"]
    assert rows_of(list(read_source(source_of(tmp_path.as_uri())))) == local


BYTES_LINE = st.one_of(
    st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"")),
    st.fixed_dictionaries({"prompt": st.sampled_from(["q", "", None, 1]), "chosen": st.sampled_from(["a", "b", ""]), "rejected": st.just("b")}).map(
        lambda row: json.dumps(row).encode()
    ),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=st.lists(BYTES_LINE, min_size=1, max_size=10), max_rows=st.integers(1, 4))
def test_every_line_is_accounted_for(tmp_path: Path, lines: list[bytes], max_rows: int) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join([b'{"prompt": "q", "chosen": "a", "rejected": "b"}', *lines]) + b"\n")
    chunks = list(read_pair_file(str(path), source_of(path), max_rows=max_rows))
    assert sum(chunk.num_rows_read for chunk in chunks) == 1 + sum(bool(line.strip(b" \t\r\n")) for line in lines)
