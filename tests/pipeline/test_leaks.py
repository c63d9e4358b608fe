"""Overlaps that ingest proposes, before judges: decided once, written beside the pools, honoured by Stage 1, Stage 2 and exports; nothing deleted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.llm.engine import EngineConfig, Request
from synpref_ray.llm.leak_judge import STATEMENTS, LeakJudgeConfig
from synpref_ray.llm.spending import Budget
from synpref_ray.pipeline.ingest import run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.leak_marks import leaked_pairs, open_leaks
from synpref_ray.pipeline.leak_proposals import gather_proposals
from synpref_ray.pipeline.leaks import LeakJudgeStepConfig, LeaksConfig, check_leaks, run_leaks
from synpref_ray.pipeline.steps import Resources
from synpref_ray.pipeline.verification import AnnotatorConfig, verify_pool
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gate import GateConfig, decide_shard, select_for_judge
from synpref_ray.rules.gold import GoldConfig
from synpref_ray.rules.labels import label_shard
from synpref_ray.tables.pools import open_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar, open_sidecar
from tests.llm.fakes import ScriptedEngine

ITEM = "How many red foxes live in the old forest near the river, and who has counted them so far?"
WORD_PAIRS = [
    ("Tell me about red foxes", "Well, foxes.", "No."),
    ("Tell me how many red foxes live at the barn", "Two.", "Three."),  # 5 words
    ("What is a fox?", "They live in the old forest near the river.", "No idea."),  # 8 words
    (ITEM, "Forty.", "None."),  # 13 and more
    ("Is it true?", "Yes.", "Nobody knows who has counted them so far, they say."),  # 6 words of the item, in the rejected reply
]
LEAKING = "They live in the old forest near the river."


class ScriptedJudge(LeakJudgeStepConfig):
    """A judge that this process plays."""

    statement: Callable[[str], str]
    engine: EngineConfig = EngineConfig(model="scripted")

    @property
    def resources(self) -> Resources:
        return Resources()

    @property
    def digests(self) -> dict[str, str]:
        return {}

    def pinned(self) -> Self:
        return self

    def check(self) -> None:
        return

    def open_engine(self, budget: Budget | None) -> Any:
        def answer(request: Request) -> str:
            return "1" if f"Statement 1: {self.statement(request.prompt)}" in request.prompt else "2"

        return ScriptedEngine(answer)


def leak_if(part: str) -> Callable[[str], str]:
    return lambda prompt: STATEMENTS[0] if part in prompt.split("Training example")[-1] else STATEMENTS[1]


def workspace(root: Path, action: str = "drop") -> dict[str, Any]:
    (root / "data").mkdir(parents=True)
    rows = [json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) for prompt, chosen, rejected in WORD_PAIRS]
    (root / "data" / "seed.jsonl").write_text("\n".join(rows) + "\n")
    (root / "data" / "wild.jsonl").write_text(json.dumps({"prompt": "live in the old forest", "chosen": "a", "rejected": "b"}) + "\n")
    (root / "bench.json").write_text(
        json.dumps([{"prompt": ITEM, "id": "fox"}, {"prompt": "Something else entirely, quite unlike the rest", "id": "no"}])
    )
    decontaminate = {"benchmarks": [{"path": str(root / "bench.json"), "name": "bench"}], "action": action}
    config = IngestConfig.model_validate({"data": str(root / "data"), "workspace": str(root / "ws"), "decontaminate": decontaminate})
    run_ingest(config, Run(config.storage, "ingest", config))
    return {"workspace": str(root / "ws"), "decontaminate": decontaminate, "gathered_shard_pairs": 2}


def judge(settings: dict[str, Any], *judges: Callable[[str], str], max_input_tokens: int = 99_000, **more: Any) -> Run:
    limits = {"max_input_tokens": max_input_tokens}
    steps = tuple(ScriptedJudge(judge=LeakJudgeConfig(judge=f"j{n}", **limits), statement=says) for n, says in enumerate(judges))
    config = LeaksConfig(judges=steps, **settings, **more)
    check_leaks(config)
    run = Run(config.storage, "decontaminate", config)
    table = run_leaks(config, run)
    assert "overlaps with benchmarks" in table
    return run


def test_a_confirmed_candidate_is_marked_and_the_rest_is_reported(tmp_path: Path) -> None:
    settings = workspace(tmp_path)
    run = judge(settings, leak_if(LEAKING))
    assert run.metrics["decontamination"]["pairs"] == {"seed": {"cleared": 2, "confirmed": 1}, "wild": {"cleared": 1}}
    storage = run.storage
    seed = open_pool(storage, "seed")
    assert seed.num_rows == len(WORD_PAIRS) - 1  # the 13 words were a reject of ingest
    leaks = open_sidecar(seed, "decontamination")
    rows = {row["chosen"]: {**row, **mark} for row, mark in zip(seed.read_all().to_pylist(), leaks.read_all().to_pylist(), strict=True)}
    leaked = rows[LEAKING]
    assert [leaked[name] for name in ("leak_decision", "leak_reason", "benchmark", "item", "field", "n", "kind")] == [
        *("drop", "confirmed", "bench", "fox", "chosen", 8, "candidate")
    ]
    assert leaked["ngram"] == "live in the old forest near the river"
    assert (rows["Two."]["leak_decision"], rows["Two."]["n"]) == ("keep", 5)
    assert (rows["Well, foxes."]["leak_decision"], rows["Well, foxes."]["num_proposals"]) == (None, 0)
    assert leaked_pairs(leaks) == {leaked["pair_id"]}
    report = storage.read_table(run.metrics["decontamination"]["report"]).to_pylist()
    line = next(row for row in report if row["leak_decision"] == "drop")
    assert (line["pair_id"], line["item"], line["source_pool"], line["verdicts"]) == (
        leaked["pair_id"],
        "fox",
        "seed",
        ["j0/0/0: leak", "j0/1/0: leak"],
    )
    assert run.metrics["decontamination"]["benchmarks"] == {
        "bench": {"candidate_05": {"cleared": 2}, "candidate_06": {"cleared": 1}, "candidate_08": {"confirmed": 1}}
    }


def test_a_second_run_asks_nobody_and_another_judge_is_asked_alone(tmp_path: Path) -> None:
    settings = workspace(tmp_path)
    first = judge(settings, leak_if(LEAKING))
    again = judge(settings, leak_if(LEAKING))
    assert sum(step["computed"] for step in again.steps) == 0
    assert again.metrics["decontamination"] == first.metrics["decontamination"]
    both = judge(settings, leak_if(LEAKING), leak_if("nothing"))
    assert [step["computed"] for step in both.steps if step["step"].startswith("judge")] == [0, 4]
    assert both.metrics["decontamination"]["pairs"]["seed"] == {"cleared": 2, "undecided": 1}  # one against one: kept
    with pytest.raises(ConfigError, match="2 decisions about overlaps"):
        open_leaks(open_pool(first.storage, "seed"), "auto")
    assert open_leaks(open_pool(first.storage, "seed"), "off") is None
    report = Path(first.metrics["decontamination"]["report"]).stem
    for pool, head in first.metrics["decontamination"]["sidecars"].items():
        for wanted in (report, head[:8]):  # the name that all pools of the run share, and the sidecar's own
            named = open_leaks(open_pool(first.storage, pool), wanted)
            assert named is not None
            assert named.fingerprint == head
    with pytest.raises(
        InputError, match=r"decontamination=none-such: pool 'seed' version 0 has no decisions of that name \(there are: \w{8}, \w{8}\)"
    ):
        open_leaks(open_pool(first.storage, "seed"), "none-such")


def two_items(root: Path, **more: Any) -> dict[str, Any]:
    """Make a workspace with a pair that shares eight words with one item and five with each of two others, whose rows have one number."""
    (root / "data").mkdir()
    pair = {"prompt": "Why?", "chosen": LEAKING, "rejected": "Nobody ever asked who keeps the bees."}
    (root / "data" / "seed.jsonl").write_text(json.dumps(pair) + "\n")
    (root / "a.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (ITEM, "Nobody ever asked who keeps what", "Bee?")))
    (root / "b.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("One?", "Then: asked who keeps the bees now")))
    benchmarks = [{"path": str(root / f"{name}.jsonl"), "name": "bench"} for name in "ab"]
    config = IngestConfig.model_validate(
        {"data": str(root / "data"), "workspace": str(root / "ws"), "decontaminate": {"benchmarks": benchmarks, **more}}
    )
    run = Run(config.storage, "ingest", config)
    run_ingest(config, run)
    assert run.metrics["candidates_beyond_max"] == max(0, 3 - config.decontaminate.max_candidates)
    return {"workspace": str(root / "ws"), "decontaminate": config.decontaminate.model_dump(mode="json")}


def test_every_item_that_a_pair_meets_goes_before_the_judges(tmp_path: Path) -> None:
    settings = two_items(tmp_path)
    run = judge(settings, lambda prompt: STATEMENTS[0] if "Then: asked who" in prompt else STATEMENTS[1])
    assert run.metrics["decontamination"]["pairs"] == {"seed": {"confirmed": 1}}
    report = run.storage.read_table(run.metrics["decontamination"]["report"]).to_pylist()
    assert [(row["item"], row["n"], row["ngram"], row["leak_reason"]) for row in report] == [
        ("0", 8, "live in the old forest near the river", "cleared"),
        ("1", 5, "nobody ever asked who keeps", "cleared"),
        ("1#2", 5, "asked who keeps the bees", "confirmed"),
    ]


def test_texts_of_proposals_are_held_a_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"{ITEM[:40]} {number}", "chosen": "c" * 200_000, "rejected": "r"} for number in range(24)]
    (tmp_path / "data" / "seed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": ITEM}]))
    decontaminate = {"benchmarks": [{"path": str(tmp_path / "bench.json"), "name": "bench"}]}
    paths = {"data": str(tmp_path / "data"), "workspace": str(tmp_path / "ws")}
    config = IngestConfig.model_validate({**paths, "decontaminate": decontaminate, "max_pairs_per_shard": 3})
    run_ingest(config, Run(config.storage, "ingest", config))
    held: list[int] = []

    def write(*arguments: Any) -> Any:
        held.append(pa.total_allocated_bytes() - before)
        return write_pool_shard(*arguments)

    monkeypatch.setattr("synpref_ray.pipeline.leak_proposals.write_pool_shard", write)
    before = pa.total_allocated_bytes()
    pool = gather_proposals(config.storage, [open_pool(config.storage, "seed")], config.decontaminate, min_words=5, max_pairs=2).pool
    assert (pool.num_rows, len(held)) == (24, 12)
    assert max(held) < 8 * 200_000  # of 24; a shard has two, a source's three
    rows_of = pool.read_all(["source_shard", "source_row", "prompt"]).to_pylist()
    assert [(row["source_shard"], row["source_row"]) for row in rows_of] == [(place // 3, place % 3) for place in range(24)]


def test_no_more_items_of_a_pair_than_asked_for_and_the_same_for_both_jobs(tmp_path: Path) -> None:
    settings = two_items(tmp_path, max_candidates=2)
    run = judge(settings, leak_if("nothing"))
    assert run.metrics["decontamination"]["benchmarks"] == {"bench": {"candidate_05": {"cleared": 1}, "candidate_08": {"cleared": 1}}}
    with pytest.raises(InputError, match="max_candidates=2, this config says 3: say the same"):
        judge({**settings, "decontaminate": {**settings["decontaminate"], "max_candidates": 3}}, leak_if("nothing"))


def test_fewer_words_may_be_left_to_chance_and_reported_overlaps_are_judged_too(tmp_path: Path) -> None:
    settings = workspace(tmp_path, action="report")
    run = judge(settings, leak_if("Forty"), min_words=7)
    kinds = run.metrics["decontamination"]["benchmarks"]["bench"]
    assert kinds == {"candidate_08": {"cleared": 1}, "overlap": {"confirmed": 1}}


def test_other_benchmarks_than_ingest_had_are_refused(tmp_path: Path) -> None:
    settings = workspace(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps([{"prompt": "Another prompt, and nothing of foxes", "id": "fox"}]))
    with pytest.raises(InputError, match="benchmark bench has other prompts than ingest compared with"):
        judge(settings, leak_if(LEAKING))
    with pytest.raises(ConfigError, match="benchmarks is empty"):
        judge({**settings, "decontaminate": {}}, leak_if(LEAKING))


def test_what_ingest_did_not_compare_is_never_called_clean(tmp_path: Path) -> None:
    settings = workspace(tmp_path)
    bench = settings["decontaminate"]["benchmarks"][0]
    with pytest.raises(InputError, match=r"did not compare with benchmark new \(it had bench\)"):
        judge({**settings, "decontaminate": {"benchmarks": [bench, {**bench, "name": "new"}]}}, leak_if(LEAKING))
    with pytest.raises(InputError, match="candidates=true, this config says false"):
        judge({**settings, "decontaminate": {"benchmarks": [bench], "candidates": False}}, leak_if(LEAKING))
    storage = IngestConfig(workspace=settings["workspace"]).storage
    (path,) = (path for path in storage.list_files("pools", deep=False) if path.startswith("pools/ingest-"))
    record = storage.read_json(path)
    storage.write_json(path, {name: value for name, value in record.items() if name != "compared"})  # as an earlier version left it
    with pytest.raises(InputError, match="ingest ran before it recorded them: ingest into another workspace"):
        judge(settings, leak_if(LEAKING))
    given = {name: settings[name] for name in ("workspace", "decontaminate")}
    again = IngestConfig.model_validate({"data": str(tmp_path / "data"), **given})
    run_ingest(again, Run(storage, "ingest", again))
    assert storage.read_json(path) == record
    for more, message in ({"benchmarks": []}, "ingest ran with none"), ({"candidates": False}, "candidates=false, this config says true"):
        other = IngestConfig.model_validate(
            {"data": str(tmp_path / "data"), "workspace": str(tmp_path / message[:16]), "decontaminate": {**settings["decontaminate"], **more}}
        )
        run_ingest(other, Run(other.storage, "ingest", other))
        with pytest.raises(InputError, match=message):
            judge({**settings, "workspace": other.workspace}, leak_if(LEAKING))


def test_without_overlaps_there_is_nothing_to_ask(tmp_path: Path) -> None:
    settings = workspace(tmp_path)
    run = judge(settings, leak_if(LEAKING), min_words=13)
    assert run.metrics["decontamination"]["pairs"] == {"seed": {}, "wild": {}}
    assert open_leaks(open_pool(run.storage, "seed"), "auto") is not None


def test_a_leak_becomes_no_gold_no_silver_and_no_curated_pair(tmp_path: Path) -> None:
    run = judge(workspace(tmp_path), leak_if(LEAKING))
    seed = open_pool(run.storage, "seed")
    leaks = open_leaks(seed, "auto")
    leaked = leaked_pairs(leaks)
    pairs = seed.read_all()
    ids = pairs["pair_id"].to_pylist()
    verdicts = tmp_path / "verdicts.jsonl"
    verdicts.write_text("".join(json.dumps({"pair_id": name, "verdict": "chosen", "annotator": "a"}) + "\n" for name in ids))
    attributes = Sidecar(seed, "attributes", "a" * 32)
    attributes.write(0, pa.table({"pair_id": ids, "objectivity": ["objective"] * len(ids), "controversiality": ["low"] * len(ids)}))
    arguments = (run, "verify", seed, attributes, 0, AnnotatorConfig(path=str(verdicts)), GoldConfig())
    human = verify_pool(*arguments, leaked).sidecars[0][0].read_all()
    gold = {name for name, split in zip(ids, human["gold_split"].to_pylist(), strict=True) if split}
    assert gold == set(ids) - leaked

    nothing = pa.nulls(len(ids), pa.string())
    shard = pairs.append_column("human_verdict", nothing).append_column("gold_split", nothing).append_column("judge_verdict", nothing)
    shard = shard.append_column("verdict_reason", pa.array(["no_judge_decides"] * len(ids)))
    labels = {row["pair_id"]: (row["label_source"], row["label_reason"]) for row in label_shard(shard, frozenset(), leaked).to_pylist()}
    assert {name for name, (source, _) in labels.items() if source != "silver"} == leaked
    assert {reason for name, (_, reason) in labels.items() if name in leaked} == {"contaminated"}

    assert leaks is not None
    marks = leaks.read_all()["leak_decision"]
    margins = pa.array([-1.0] * len(ids), pa.float32())
    scored = pairs.append_column("margin_best", margins).append_column("margin_gold", pa.array([1.0] * len(ids), pa.float32()))
    scored = scored.append_column("judge_verdict", pa.array(["chosen"] * len(ids))).append_column("leak_decision", marks)
    asked = dict(zip(ids, select_for_judge(scored, GateConfig()).to_pylist(), strict=True))
    decided = {row["pair_id"]: (row["decision"], row["decision_reason"]) for row in decide_shard(scored, GateConfig()).to_pylist()}
    assert {name for name, is_asked in asked.items() if not is_asked} == leaked
    assert {name for name, found in decided.items() if found == ("drop", "contaminated")} == leaked
    assert {found for name, found in decided.items() if name not in leaked} == {("keep", "gold_rm_and_judge_agree")}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_real_engine_is_asked_once(tmp_path: Path) -> None:
    settings = workspace(tmp_path)
    engine = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "kv_cache_bytes": 1 << 28}
    config = LeaksConfig.model_validate({**settings, "judges": [{"engine": engine, "judge": {"judge": "smollm2-135m"}}]})
    check_leaks(config)
    runs = []
    for _ in range(2):
        runs.append(Run(config.storage, "decontaminate", config))
        run_leaks(config, runs[-1])
    assert sum(step["computed"] for step in runs[1].steps) == 0
    counts = runs[0].metrics["decontamination"]
    assert counts == runs[1].metrics["decontamination"]
    assert sum(sum(found.values()) for found in counts["pairs"].values()) == 4
    (file,) = (tmp_path / "ws" / "decontamination" / "judged").glob("*.parquet")
    assert all(len(row["verdicts"]) == 2 for row in pq.read_table(file).to_pylist())
