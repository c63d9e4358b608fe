"""A set as a data set for others: what goes out by licence and by mark, the card, and that `datasets` and TRL read it as it is."""

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.export import main
from synpref_ray.errors import ConfigError, InputError, RunConflictError
from synpref_ray.ingest.pii import PII_SCHEMA
from synpref_ray.pipeline.export import EXPORT_SCHEMA, ExportConfig, check_export, run_export
from synpref_ray.pipeline.gathering import gather_pool
from synpref_ray.pipeline.hygiene import HygieneConfig, run_hygiene
from synpref_ray.pipeline.ingest import run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gate import DECISION_SCHEMA
from synpref_ray.rules.labels import LABEL_SCHEMA
from synpref_ray.rules.leaks import LEAKS_SCHEMA
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sets import Member, save_set
from synpref_ray.tables.sidecars import Sidecar
from tests.ingest.test_token_lengths import write_tokenizer

SOURCES = {"open": "mit", "share": "cc-by-4.0", "closed": "inf", "nobody": ""}
NAME = "curated-wild-kept-and-flipped"


def seal(sidecar: Sidecar, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    start = 0
    for shard in sidecar.pool.shards:
        sidecar.write(shard.number, pa.Table.from_pylist(rows[start : start + shard.rows], schema=schema))
        start += shard.rows
    sidecar.pool.storage.write_json(
        f"{sidecar.folder}/manifest.json", {"pool_digest": sidecar.pool.digest, "fingerprint": sidecar.fingerprint, "rejected": {}}
    )


def workspace(root: Path, *, facts: bool = True) -> Path:
    """Make a workspace with four sources of six pairs, of which the last pair of each is dropped and the fifth flipped."""
    (root / "data").mkdir(parents=True)
    sources = []
    for source, licence in SOURCES.items():
        lines = [{"prompt": f"What is {source} {n}?", "chosen": f"Right answer {n}.", "rejected": f"Wrong {n}."} for n in range(6)]
        lines[1]["chosen"] = f"Ask jane.{source}@uni-bonn.de"
        (root / "data" / f"{source}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        sources.append({"name": source, "path": str(root / "data" / f"{source}.jsonl"), "licence": licence})
    config = IngestConfig.model_validate({"sources": sources, "workspace": str(root / "ws"), "max_pairs_per_shard": 7})
    run_ingest(config, Run(config.storage, "ingest", config))
    pool = open_pool(config.storage, "wild")
    rows = pool.read_all(["pair_id", "prompt"]).to_pylist()
    numbers = [int(row["prompt"][0]["content"][-2]) for row in rows]
    decided = [("flip", True) if number == 4 else ("drop", False) if number == 5 else ("keep", False) for number in numbers]
    decisions = [
        {"pair_id": row["pair_id"], "decision": what, "flipped": flips, "decision_reason": "r"}
        for row, (what, flips) in zip(rows, decided, strict=True)
    ]
    decision = Sidecar(pool, "decision", "d" * 32)
    seal(decision, decisions, DECISION_SCHEMA)
    save_set(config.storage, NAME, [Member(decision, (("decision", ("keep", "flip")),))])
    if facts:
        (root / "tokenizer").mkdir()
        hygiene = HygieneConfig(workspace=str(root / "ws"), pools=("wild",), tokenizer=str(write_tokenizer(root / "tokenizer")))
        run_hygiene(hygiene, Run(hygiene.storage, "hygiene", hygiene))
        tags = [
            {"pair_id": row["pair_id"], "task_category": "math" if number else "coding_and_debugging"}
            for row, number in zip(rows, numbers, strict=True)
        ]
        seal(Sidecar(pool, "attributes", "a" * 32), tags, ATTRIBUTES_SCHEMA)
        leaks = [
            {"pair_id": row["pair_id"], "leak_decision": "drop" if number == 2 else None, "num_proposals": 0}
            for row, number in zip(rows, numbers, strict=True)
        ]
        seal(Sidecar(pool, "decontamination", "c" * 32), leaks, LEAKS_SCHEMA)
    return root / "ws"


def export(ws: Path, **settings: Any) -> dict[str, Any]:
    config = ExportConfig.model_validate({"workspace": str(ws), "set": NAME, **settings})
    check_export(config)
    run = Run(config.storage, "export", config)
    assert "data set:" in run_export(config, run)
    found: dict[str, Any] = run.metrics["export"]
    return found


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    files = sorted(Path(record["folder"]).glob("data/train-*.parquet"))
    assert len(files) == record["files"]
    assert all(pq.read_schema(file).equals(EXPORT_SCHEMA) for file in files)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_what_goes_out_is_counted_and_so_is_what_does_not(tmp_path: Path) -> None:
    record = export(workspace(tmp_path), licences=["mit", "cc-by-4.0"], max_pii_score=1, max_pairs_per_file=4)
    rows = rows_of(record)
    assert record["sources"] == {"open": 3, "share": 3}  # of six: one dropped, one with an address, one a leak
    assert record["licences"] == {"cc-by-4.0": 3, "mit": 3}
    assert record["left_out"] == {"licence": 10, "contaminated": 2, "personal_data": 2}
    assert record["left_out_by_licence"] == {"inf": 5, "unknown": 5}
    assert record["task_categories"] == {"math": 4, "coding_and_debugging": 2}
    assert record["token_lengths"]["prompt_tokens"] == [{"from": 4, "to": 7, "count": 6}]
    assert (record["pairs"], record["flipped"], record["files"]) == (6, 2, 2)
    flipped = [row for row in rows if row["flipped"]]
    assert [row["chosen"] for row in flipped] == [[{"role": "assistant", "content": "Wrong 4."}]] * 2
    assert [(row["chosen_tokens"], row["rejected_tokens"]) for row in flipped] == [(2, 3)] * 2
    assert {row["licence"] for row in rows} == {"mit", "cc-by-4.0"}


def test_what_rounds_selected_is_left_out_by_the_decisions_about_the_pool_that_it_comes_from(tmp_path: Path) -> None:
    ws = workspace(tmp_path)
    storage = ExportConfig(workspace=str(ws), set=NAME).storage
    wild = open_pool(storage, "wild")
    chosen = gather_pool(storage, "round-01-selected", [Piece(wild, shard.number, tuple(range(shard.rows))) for shard in wild.shards], inputs={})
    label = Sidecar(chosen, "label", "1" * 32)
    says = {"label_source": "silver", "label_reason": "judge", "flipped": False}
    seal(label, [{"pair_id": name, **says} for name in chosen.read_all(["pair_id"])["pair_id"].to_pylist()], LABEL_SCHEMA)
    save_set(storage, "silver", [Member(label, (("label_source", ("silver",)),))])
    every = {"set": "silver", "unknown_licences": True}
    assert export(ws, **every)["left_out"] == {"contaminated": 4}  # one of each source
    assert export(ws, **every, decontamination="c" * 8)["left_out"] == {"contaminated": 4}
    assert export(ws, **every, decontamination="off")["left_out"] == {}
    with pytest.raises(InputError, match="pool 'wild' version 0 has no decisions of that name"):
        export(ws, **every, decontamination="cafe")


def test_what_was_not_scanned_whole_stays_here_where_scores_count(tmp_path: Path) -> None:
    ws = workspace(tmp_path, facts=False)
    pool = open_pool(ExportConfig(workspace=str(ws), set=NAME).storage, "wild")
    rows = pool.read_all(["pair_id", "source", "prompt"]).to_pylist()
    scans = [
        {
            "pair_id": row["pair_id"],
            "pii_score": None,
            "pii": [],
            "pii_scanned_whole": row["source"] != "open" or "0?" not in row["prompt"][0]["content"],
        }
        for row in rows
    ]
    seal(Sidecar(pool, "pii", "f" * 32), scans, PII_SCHEMA)
    some = export(ws, licences=["mit"], max_pii_score=2)
    assert (some["pairs"], some["left_out"]) == (4, {"licence": 15, "not_scanned_whole": 1})
    assert "- 1: the scan for personal data did not read" in (Path(some["folder"]) / "README.md").read_text()
    assert export(ws, licences=["mit"])["pairs"] == 5


def test_a_comparison_settled_twice_goes_out_once_and_its_texts_are_not_kept(tmp_path: Path) -> None:
    num, length = 30, 200_000
    lines = []
    for number in range(num):
        replies = {"chosen": f"{number} " + "a" * length, "rejected": f"{number} b"}
        lines += [{"prompt": f"{number}?", **replies}, {"prompt": f"{number}?", "chosen": replies["rejected"], "rejected": replies["chosen"]}]
    (tmp_path / "wild.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"sources": [{"name": "s", "path": str(tmp_path / "wild.jsonl"), "licence": "mit"}], "workspace": str(tmp_path / "ws")}
    ingested = IngestConfig.model_validate({**settings, "max_pairs_per_shard": 2})
    run_ingest(ingested, Run(ingested.storage, "ingest", ingested))
    pool = open_pool(ingested.storage, "wild")
    rows = pool.read_all(["pair_id", "chosen"]).to_pylist()
    flips = [len(row["chosen"]) < length for row in rows]
    decided = [
        {"pair_id": row["pair_id"], "decision": "flip" if flip else "keep", "flipped": flip, "decision_reason": "r"}
        for row, flip in zip(rows, flips, strict=True)
    ]
    decision = Sidecar(pool, "decision", "d" * 32)
    seal(decision, decided, DECISION_SCHEMA)
    save_set(pool.storage, NAME, [Member(decision, (("decision", ("keep", "flip")),))])
    tracemalloc.start()
    try:
        record = export(tmp_path / "ws", max_pairs_per_file=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (record["pairs"], record["left_out"]) == (num, {"settled_twice": num})
    assert sum(len(row["chosen"][0]["content"]) > length for row in rows_of(record)) == num
    assert peak < num * length / 2  # of all their texts


def test_licences_that_nobody_knows_stay_here_unless_told(tmp_path: Path) -> None:
    ws = workspace(tmp_path, facts=False)
    assert export(ws, out=str(tmp_path / "known"))["licences"] == {"cc-by-4.0": 5, "inf": 5, "mit": 5}
    assert export(ws, out=str(tmp_path / "all"), unknown_licences=True)["licences"] == {"cc-by-4.0": 5, "inf": 5, "mit": 5, "unknown": 5}
    told = export(ws, out=str(tmp_path / "told"), licence_of={"nobody": "mit"}, licences=["mit"])
    assert told["sources"] == {"nobody": 5, "open": 5}
    assert rows_of(told)[0]["task_category"] is None


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    ws = workspace(tmp_path, facts=False)
    with pytest.raises(ConfigError, match=r"licences: no source has gpl; there are cc-by-4\.0, inf, mit, unknown"):
        export(ws, licences=["gpl"])
    with pytest.raises(ConfigError, match="was not scanned for personal data"):
        export(ws, max_pii_score=1)
    with pytest.raises(InputError, match=r"no pair of .* may go out: left out \{'licence': 20\}"):
        export(ws, licences=["unknown"])
    with pytest.raises(InputError, match="there is no set 'other'"):
        export(ws, set="other")


def test_an_export_is_made_once_and_another_is_not_mixed_in(tmp_path: Path) -> None:
    ws, out = workspace(tmp_path, facts=False), tmp_path / "out"
    first = export(ws, out=str(out))
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert export(ws, out=str(out)) == first
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == times
    with pytest.raises(RunConflictError, match="holds another export"):
        export(ws, out=str(out), licences=["mit"])
    assert not (out / "export-started.json").exists()
    (out / "export.json").rename(out / "export-started.json")  # cut off before its end
    (out / "data" / "train-00007.parquet").write_text("cut off")
    assert export(ws, out=str(out)) == first
    assert not (out / "data" / "train-00007.parquet").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RunConflictError, match="holds other files"):
        export(ws, out=str(tmp_path / "full"))


@pytest.mark.parametrize("names", [("README.md", "data/train-00000.parquet"), ("export-started.json", "data/train-00000-of-00001.parquet")])
def test_a_data_set_of_others_is_never_taken_for_a_cut_off_export(tmp_path: Path, names: tuple[str, ...]) -> None:
    files = [tmp_path / "clone" / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    with pytest.raises(RunConflictError, match="holds other files; give another folder"):
        export(workspace(tmp_path, facts=False), out=str(tmp_path / "clone"))
    assert [file.read_text() for file in files] == ["mine"] * 2


def test_the_card_says_it_all(tmp_path: Path) -> None:
    record = export(workspace(tmp_path), licences=["mit"], title="My pairs")
    text = (Path(record["folder"]) / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    assert front["pretty_name"] == "My pairs"
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
    for line in ("| open | 4 |", "| mit | 4 |", "| math | 3 |", "- 15: the licence", "- 1: judges say", "4-7  ####", "  - under inf: 5"):
        assert line in text
    assert "SIMULATED" not in text


def test_a_trial_with_simulated_people_says_so(tmp_path: Path) -> None:
    ws = workspace(tmp_path, facts=False)
    (ws / "rounds").mkdir()
    (ws / "rounds" / "stage2.json").write_text('{"simulated_gold": true}')
    assert "SIMULATED" in (Path(export(ws)["folder"]) / "README.md").read_text()


def test_any_filter_over_the_decision_table(tmp_path: Path) -> None:
    ws = workspace(tmp_path, facts=False)
    pool = open_pool(ExportConfig(workspace=str(ws), set=NAME).storage, "wild")
    rows = pool.read_all(["pair_id"]).to_pylist()
    margins = {row["pair_id"]: None if place % 5 == 0 else float(place % 4) for place, row in enumerate(rows)}
    decided = [
        {"pair_id": name, "decision": "keep" if place % 2 else "flip", "flipped": not place % 2, "decision_reason": "ab"[place % 3 > 0]}
        for place, name in enumerate(margins)
    ]
    decision = Sidecar(pool, "decision", "e" * 32)
    seal(decision, [{**row, "margin_gold": margins[row["pair_id"]]} for row in decided], DECISION_SCHEMA)
    save_set(pool.storage, "all", [Member(decision, (("decision", ("keep", "flip")),))])
    everything = {"set": "all", "unknown_licences": True}
    wanted = {row["pair_id"] for row in decided if row["decision_reason"] == "b" and margins[row["pair_id"]] in (1.0, 2.0)}
    record = export(
        ws,
        **everything,
        where={"decision_reason": ["b", "c"]},
        at_least={"margin_gold": 1.0},
        at_most={"margin_gold": 2.0},
        out=str(tmp_path / "some"),
    )
    assert {row["pair_id"] for row in rows_of(record)} == wanted
    assert record["left_out"] == {"filter": len(rows) - len(wanted)}
    text = (tmp_path / "some" / "README.md").read_text()
    assert "`decision_reason` is b or c, and `margin_gold` is at least 1, and `margin_gold` is at most 2" in text
    assert export(ws, **everything, out=str(tmp_path / "all"))["pairs"] == len(rows)
    kept = export(ws, **everything, where={"flipped": ["false"]}, out=str(tmp_path / "kept"))
    assert (kept["pairs"], kept["flipped"]) == (len(rows) // 2, 0)  # the 26M kind out of the 40M kind
    with pytest.raises(ConfigError, match="all has no column margins to filter by; there are pair_id, decision"):
        export(ws, **everything, at_least={"margins": 1.0})
    with pytest.raises(ConfigError, match="at_least and at_most are for numbers, and decision of all is none"):
        export(ws, **everything, at_most={"decision": 1.0})


def test_openrlhf_reads_the_folder(tmp_path: Path) -> None:
    """Its reward data set, with --prompt_key prompt --apply_chat_template, renders `prompt + chosen` by the tokenizer's template and cuts the
    rendered prompt off; a column `margin` would go into its loss.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from synpref_ray.bundled import resolve_model

    record = export(workspace(tmp_path, facts=False), licences=["mit", "cc-by-4.0"])
    loaded = load_dataset("parquet", data_files=f"{record['folder']}/data/*.parquet", split="train", cache_dir=str(tmp_path / "cache"))
    assert "margin" not in loaded.column_names
    render = AutoTokenizer.from_pretrained(resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")).apply_chat_template
    for row in loaded:
        prompt = render(row["prompt"], tokenize=False, add_generation_prompt=True)
        for reply in ("chosen", "rejected"):
            assert [message["role"] for message in row[reply]] == ["assistant"]
            whole = render(row["prompt"] + row[reply], tokenize=False)
            assert whole.startswith(prompt)
            assert whole[len(prompt) :].startswith(row[reply][0]["content"])


class Hub:
    """Stands where the hub's client does, and keeps what it is asked for."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo: str, **more: Any) -> None:
        self.asked.append(("create", {"repo": repo, **more}))

    def upload_folder(self, **more: Any) -> Any:
        if more["repo_id"] == "me/refused":
            raise OSError("403: no rights\nhere")
        self.asked.append(("upload", more))
        return SimpleNamespace(oid="c0ffee", commit_url="https://hub/commit/c0ffee")


def test_pushing_is_a_verb_and_never_a_side_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    ws, out = workspace(tmp_path, facts=False), tmp_path / "out"
    push = ["push", f"workspace={ws}", f"folder={out}", "repo=me/pairs"]
    assert main(push) == 2
    assert "is no finished export" in capsys.readouterr().err
    assert main([f"workspace={ws}", f"set={NAME}", f"out={out}"]) == 0
    assert main([*push, "--dry-run"]) == 0
    assert Hub.asked == []
    assert main(push) == 0
    assert "15 pairs in 1 files: https://hub/commit/c0ffee" in capsys.readouterr().out
    (_, made), (_, sent) = Hub.asked
    assert made == {"repo": "me/pairs", "repo_type": "dataset", "private": True, "exist_ok": True}
    assert (sent["folder_path"], sent["revision"], sent["repo_type"]) == (str(out), "main", "dataset")
    assert main([*push, "repo=me/refused"]) == 2
    assert "cannot push to me/refused: OSError: 403: no rights here" in capsys.readouterr().err
    (out / "data" / "train-00000.parquet").unlink()
    assert main(push) == 2
    assert "has 0 of its 1 files" in capsys.readouterr().err


def test_what_simulated_people_labelled_is_pushed_only_if_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    ws = workspace(tmp_path, facts=False)
    (ws / "rounds").mkdir()
    (ws / "rounds" / "stage2.json").write_text('{"simulated_gold": true}')
    folder = export(ws)["folder"]
    push = ["push", f"workspace={ws}", f"folder={folder}", "repo=me/pairs"]
    assert main(push) == 2
    assert Hub.asked == []
    assert main([*push, "simulated=true", "private=false"]) == 0
    assert Hub.asked[0][1]["private"] is False


def test_datasets_loads_the_folder(tmp_path: Path) -> None:
    from datasets import load_dataset

    record = export(workspace(tmp_path), licences=["mit", "cc-by-4.0"], max_pairs_per_file=3)
    loaded = load_dataset(record["folder"], split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == record["pairs"]
    assert loaded[0]["chosen"][0]["role"] == "assistant"
    assert [row["pair_id"] for row in loaded] == [row["pair_id"] for row in rows_of(record)]


@pytest.mark.slow
def test_trl_trains_on_the_folder_as_it_is(tmp_path: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from tests.pipeline.small_loop import make_backbone

    record = export(workspace(tmp_path))
    loaded = load_dataset(record["folder"], split="train", cache_dir=str(tmp_path / "cache"))
    backbone = str(make_backbone(tmp_path / "backbone"))
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    settings = RewardConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = RewardTrainer(model=model, args=settings, train_dataset=loaded, processing_class=AutoTokenizer.from_pretrained(backbone))
    assert trainer.train().global_step == 2
