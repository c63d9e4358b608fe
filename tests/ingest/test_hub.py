"""Streaming with `datasets`, from a local folder in the hub's layout: the same pairs as the files give."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.errors import InputError
from synpref_ray.ingest.catalogue import with_catalogue
from synpref_ray.ingest.hub import hub_address, pin_revision, read_hub_chunks
from synpref_ray.ingest.readers import read_pair_file
from synpref_ray.ingest.source import FileFormat, HubDataset, SourceConfig

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(("name", "files"), [("helpsteer3", "preference/train.jsonl"), ("skywork_80k", "train.jsonl"), ("helpsteer2", "train.jsonl")])
def test_streamed_rows_make_the_same_pairs(tmp_path: Path, name: str, files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set" / files).parent.mkdir(parents=True)
    shutil.copy(FIXTURES / f"{name}.jsonl", tmp_path / "set" / files)
    source = with_catalogue(SourceConfig(name=name, format=FileFormat.JSONL)).model_copy(
        update={"hub": HubDataset(dataset=str(tmp_path / "set"), files=files)}
    )
    streamed = list(read_hub_chunks(source, max_rows=2, max_bytes=1 << 20))
    read = list(read_pair_file(str(FIXTURES / f"{name}.jsonl"), source))
    assert len(streamed) > 1 or name == "helpsteer2"
    columns = ["pair_id", "source_id", "row"]
    assert [pair for chunk in streamed for pair in chunk.pairs.select(columns).to_pylist()] == [
        pair for chunk in read for pair in chunk.pairs.select(columns).to_pylist()
    ]
    assert sum(chunk.num_rows_read for chunk in streamed) == sum(chunk.num_rows_read for chunk in read)


def test_a_split_of_its_own_name_is_streamed_from_its_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set" / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([json.loads(line) for line in (FIXTURES / "ultrafeedback_binarized.jsonl").read_text(encoding="utf-8").splitlines()])
    for split in ("train_prefs", "test_prefs", "train_sft"):
        pq.write_table(table, tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    source = with_catalogue(SourceConfig(name="ultrafeedback_binarized"))
    source = source.model_copy(update={"hub": source.hub.model_copy(update={"dataset": str(tmp_path / "set")})})
    assert sum(chunk.num_rows_read for chunk in read_hub_chunks(source, max_rows=9, max_bytes=1 << 20)) == table.num_rows


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read hf://datasets/"):
        list(read_hub_chunks(SourceConfig(name="a", hub=HubDataset(dataset=str(tmp_path / "gone"))), max_rows=1, max_bytes=1))
    with pytest.raises(InputError, match="give a local copy as its path"):
        pin_revision(HubDataset(dataset="nobody/nothing"))  # the tests are offline
    with pytest.raises(InputError, match="is a folder"):
        pin_revision(HubDataset(dataset=str(tmp_path)))


def test_signed_urls_of_the_hub_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise httpx2.HTTPError("403 for https://cdn.hub/a.parquet?Expires=1&Signature=wJalrXUtnFEMI&Key-Pair-Id=K (expired)")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(InputError, match=r"403 for https://cdn\.hub/a\.parquet\?… \(expired\)"):
        pin_revision(HubDataset(dataset="nobody/nothing"))
    with pytest.raises(InputError, match=r"403 for https://cdn\.hub/a\.parquet\?… \(expired\)$"):
        list(read_hub_chunks(SourceConfig(name="a", hub=HubDataset(dataset="nobody/nothing")), max_rows=1, max_bytes=1))


def test_faults_of_the_net_and_of_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise httpx2.ConnectError("no route\nto the hub")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
        with pytest.raises(InputError, match="nobody/nothing from the hub: no route to the hub; give a local copy"):
            pin_revision(HubDataset(dataset="nobody/nothing"))
        patch.setattr("datasets.load_dataset", refuse)
        with pytest.raises(InputError, match=r"no route to the hub$"):
            list(read_hub_chunks(SourceConfig(name="a", hub=HubDataset(dataset="nobody/nothing")), max_rows=1, max_bytes=1))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = b"".join(json.dumps({"prompt": str(place), "chosen": "a", "rejected": "b"}).encode() + b"\n" for place in range(50_000))
    (tmp_path / "set" / "train.jsonl.gz").write_bytes(gzip.compress(rows)[:-2000])  # breaks off while it is read
    source = SourceConfig(name="a", hub=HubDataset(dataset=str(tmp_path / "set")))
    with pytest.raises(InputError, match="cannot read hf://datasets/"):
        list(read_hub_chunks(source, max_rows=1000, max_bytes=1 << 20))


def test_an_address_says_what_was_read() -> None:
    hub = HubDataset(dataset="nvidia/HelpSteer3", revision="abc", config="preference")
    assert hub_address(hub) == "hf://datasets/nvidia/HelpSteer3@abc#preference,train"
