"""A workspace of a few hundred pairs as finished jobs leave it, written in seconds: real rules and records, rewards and votes drawn by chance."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from synpref_ray.config import Settings
from synpref_ray.evaluation.accuracy import bootstrap_accuracy, paired_bootstrap
from synpref_ray.evaluation.benchmarks.core import Item, outcome_of_scores
from synpref_ray.evaluation.benchmarks.estimates import point_values
from synpref_ray.evaluation.benchmarks.fields import user_message
from synpref_ray.evaluation.benchmarks.rm_bench import DOMAINS, RM_BENCH, measure_rm_bench
from synpref_ray.evaluation.judge_report import judge_report
from synpref_ray.evaluation.label_quality import label_quality
from synpref_ray.evaluation.reliability.attacks import measure_hack
from synpref_ray.evaluation.reliability.bias import audit_biases
from synpref_ray.evaluation.reliability.comparisons import comparisons_of
from synpref_ray.pipeline.attack import attack_report
from synpref_ray.pipeline.audits import AuditConfig, AuditReport, _calibration, _note_biases, _note_hack
from synpref_ray.pipeline.stage2 import DecideWorker
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_record import EvaluationRecord, StepRecord, TrainingRecord
from synpref_ray.rules.gate import DECISION_SCHEMA, GateConfig
from synpref_ray.rules.judges import TrustConfig, judge_trust
from synpref_ray.rules.verdicts import agreement_records
from synpref_ray.schema import POOL_SCHEMA, Decision, comparison_id, pair_id, prompt_group
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.storage import Storage
from tests.evaluation.test_judge_report import pair as gold_pair
from tests.evaluation.test_judge_report import table as gold_table
from tests.evaluation.test_judge_report import votes

SIZES = {"seed": 60, "unverified": 120, "wild": 240}
CATEGORIES = ("math", "coding_and_debugging", "creative_writing", "information_seeking")


class EvaluateSettings(Settings):
    """What the report reads of an evaluation's config."""

    model: str
    benchmarks: tuple[str, ...]


def make_workspace(folder: Path, *, hostile: tuple[str, ...] = (), seed: int = 0) -> Storage:
    """Write the workspace; texts in `hostile` become prompts, replies, names of sources and of a judge."""
    storage, random = Storage(str(folder)), Random(seed)
    pools = {name: make_texts(storage, name, size, hostile) for name, size in SIZES.items()}
    ingest_run(storage, pools, hostile)
    rounds_and_stage1(storage, random, hostile[0] if hostile else "judge-b")
    decisions = stage2(storage, pools["wild"], random)
    for name, backbone in (("best-r01-0a1b2c3d", "small"), ("best-r02-1b2c3d4e", "small"), ("gold-2c3d4e5f", "meta-llama/Llama-3.2-1B-Instruct")):
        storage.write_json(f"models/{name}/training_record.json", training_record(backbone, random).model_dump(mode="json"))
    evaluate_run(storage, random)
    attack_run(storage)
    demo_run(storage, decisions, random)
    annotate_run(storage)
    return storage


def make_texts(storage: Storage, name: str, size: int, hostile: tuple[str, ...]) -> Pool:
    """Write a pool of two shards."""
    rows = []
    for number in range(size):
        evil = hostile[number % len(hostile)] if hostile else ""
        prompt = [{"role": "user", "content": f"Name {number % 7 + 2} uses of {name} number {number // 3}. {evil}".strip()}]
        chosen = f"Here are some uses of number {number}:\n\n- one that is true\n- another one\n\n{evil}".strip()
        rejected = f"There are none. {evil} {number}".strip()
        names = {"pair_id": pair_id(prompt, chosen, rejected), "comparison_id": comparison_id(prompt, chosen, rejected)}
        source = evil or f"{name}-{'ab'[number % 2]}"
        rows.append({**names, "prompt_group": prompt_group(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source})
        rows[-1] |= {"source_id": str(number), "contradicted": False}
    table = pa.Table.from_pylist(rows, schema=POOL_SCHEMA)
    half = size // 2
    shards = [write_pool_shard(storage, name, place, table.slice(place * half, half)) for place in range(2)]
    return commit_pool(storage, name, "f" * 32, shards, {})


def ingest_run(storage: Storage, pools: Mapping[str, Pool], hostile: tuple[str, ...]) -> None:
    """Write a run of ingest that made the pools of two sources each."""
    run = Run(storage, "ingest", Settings())
    sources = {}
    for name, pool in pools.items():
        for place, label in enumerate(("a", "b")):
            kept = pool.num_rows // 2
            rejected = {"tied": 4 + place, "empty_reply": 2}
            counts = {"rows": kept + 15, "records": kept + 15 + place, "kept": kept, "rejected": rejected, "duplicates": 6, "contaminated": 3}
            title = hostile[place - 5] if hostile and name == "wild" else f"{name}-{label}"
            sources[title] = {**counts, "route": name, "label_kind": "human", "licence": "apache-2.0"}
    run.step("ingest", rows=500, computed=500, rejected={}, seconds=12.5)
    run.metrics["sources"] = sources
    run.finish()


def gold_votes(random: Random, second: str, skill: float) -> pa.Table:
    """Return judged gold: one judge that is mostly right, and one that answers by position half of the time."""
    rows = []
    for number in range(60):
        human = random.choice(("chosen", "rejected"))
        wrong = "rejected" if human == "chosen" else "chosen"
        good = [human if random.random() < skill else wrong]
        blind = [["chosen"], ["rejected"]] if random.random() < 0.5 else [[human if random.random() < 0.65 else wrong]] * 2
        kind = {"objectivity": "objective" if number % 3 else "subjective", "controversiality": ("low", "medium", "high")[number % 3]}
        cells = (votes("judge-a", good, good), votes(second, *blind))
        rows.append(gold_pair(f"prompt {number}", human, *cells, task_category=CATEGORIES[number % 4], **kind))
    return gold_table(rows)


def accuracy(random: Random, share: float, count: int) -> dict[str, Any]:
    """Return a measured accuracy of about `share`."""
    flags = np.array([random.random() < share for _ in range(count)])
    return asdict(bootstrap_accuracy(flags, num_resamples=500))


def rounds_and_stage1(storage: Storage, random: Random, second: str) -> None:
    """Write the records of the seed and two rounds, and of Stage 1's end."""
    for number in range(3):
        tables = {split: gold_votes(random, second, 0.68 + 0.06 * number) for split in ("working", "audit")}
        trust = {
            split: {judge: judge_trust(records, TrustConfig()).report() for judge, records in agreement_records(table).items()}
            for split, table in tables.items()
        }
        trained = {"model": f"best-r{number:02d}-" + ("0a1b2c3d" if number == 1 else "1b2c3d4e"), "silver_pairs": 28 + 30 * number}
        record = {
            "round": number,
            "selected_pairs": 40 * bool(number),
            "set_sizes": {"silver": 30 + 32 * number, "gold-working": 18 + 9 * number, "gold-audit": 12 + 6 * number},
            "simulated_gold": True,
            "judges_on_working_gold": trust["working"],
            "judges_on_audit_gold": trust["audit"],
            "judge_report": {split: judge_report(table) for split, table in tables.items()},
            "training": trained if number else None,
            "best_rm_on_working_gold": accuracy(random, 0.66 + 0.07 * number, 40) if number else {},
            "best_rm_on_audit_gold": accuracy(random, 0.64 + 0.07 * number, 60) if number else {},
        }
        storage.write_json(f"rounds/{number:02d}/round.json", record)
    final = {"best": accuracy(random, 0.8, 60), "gold": accuracy(random, 0.72, 60)}
    models = {"best_rm": {"name": "best-r02-1b2c3d4e", "digest": "d"}, "gold_rm": {"name": "gold-2c3d4e5f", "digest": "d"}}
    storage.write_json("rounds/stage1.json", {**models, "simulated_gold": True, "audit_gold_accuracy": final, "rounds": 2, "sets": {}})


def stage2(storage: Storage, pool: Pool, random: Random) -> pa.Table:
    """Decide every wild pair by the gate from margins drawn by chance; write the record, return the decisions."""

    class Decide(DecideWorker):
        def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
            best = [random.gauss(0.6, 1.4) for _ in range(shard.num_rows)]
            gold = [0.6 * margin + random.gauss(0.1, 0.9) for margin in best]
            judged = [random.choice(("chosen", "rejected", None)) if margin < 0 else None for margin in best]
            beside = {
                "margin_best": pa.array(best, pa.float32()),
                "margin_gold": pa.array(gold, pa.float32()),
                "ask_judge": pa.array([margin < 0 for margin in best], pa.bool_()),
                "judge_verdict": pa.array(judged, pa.string()),
            }
            for name, values in beside.items():
                shard = shard.append_column(name, values)
            return super().__call__(shard, key)

    arguments = {"gate": GateConfig(), "gold_groups": pa.array([], pa.string())}
    step = Step("decide", 1, Decide, (Output("decision", DECISION_SCHEMA),), {}, worker_arguments=lambda _: arguments)
    sidecar = run_step(step, [StepInput(pool, ("prompt_group",))]).sidecars[0][0]
    table = sidecar.read_all()
    pairs = list(zip(table["decision"].to_pylist(), table["decision_reason"].to_pylist(), strict=True))
    record = {
        "pool": pool.name,
        "decision": sidecar.fingerprint,
        "pairs": pool.num_rows,
        "judged_pairs": sum(verdict is not None for verdict in table["judge_verdict"].to_pylist()),
        "decisions": {name.value: sum(what == name for what, _ in pairs) for name in Decision},
        "reasons": {f"{what}/{why}": pairs.count((what, why)) for what, why in sorted(set(pairs))},
        "judge_report": {},
        "simulated_gold": True,
    }
    storage.write_json("rounds/stage2.json", record)
    return table


def training_record(backbone: str, random: Random) -> TrainingRecord:
    """Return a run of 300 steps whose loss falls."""
    nothing = {"epoch": 0.0, "margin": 0.0, "mean_reward": 0.0, "min_reward": 0.0, "max_reward": 0.0, "num_tokens": 0, "learning_rate": 1e-5}
    nothing |= {"grad_norm": 1.0, "tokens_per_second": 1.0, "unique_tokens_per_second": 1.0, "padding_fraction": 0.0, "shared_fraction": 0.4}
    nothing |= {"stall_fraction": 0.0, "flops_per_second": 1.0}
    steps = []
    for step in range(1, 301):
        loss = 0.69 * (0.35 + 0.65 * 0.985**step) + random.gauss(0, 0.03)
        steps.append(StepRecord(step=step, loss=loss, accuracy=min(1.0, 0.5 + 0.4 * (1 - loss)), num_pairs=16, seconds=1.0, mfu=None, **nothing))
    measured = [
        EvaluationRecord(step=step, accuracy=0.55 + 0.0009 * step + random.gauss(0, 0.02), loss=0.5, margin=0.5, num_pairs=40, seconds=1.0)
        for step in range(50, 301, 50)
    ]
    return TrainingRecord(
        config=TrainConfig(backbone=backbone),
        versions={},
        template_digest="t",
        shares_prefixes=True,
        num_pairs=4800,
        num_dropped={},
        num_gold_pairs=40,
        num_gold_dropped={},
        num_workers=1,
        steps=steps,
        evaluations=measured,
        chosen_step=300,
        gold_accuracy=measured[-1].accuracy,
        gold_loss=0.5,
        num_sequence_tokens=900_000,
        num_unique_tokens=540_000,
        padding_fraction=0.0,
        shared_fraction=0.4,
        seconds={"train": 300.0, "total": 340.0},
    )


def evaluate_run(storage: Storage, random: Random) -> None:
    """Write an evaluation on whole and partial benchmarks, of a model and of a judge."""
    model = storage.join("models/gold-2c3d4e5f")
    run = Run(storage, "evaluate", EvaluateSettings(model=model, benchmarks=("rm_bench", "judgebench", "rewardmath")))
    about = {"rm_bench": (1327, 1327), "judgebench": (350, 350), "rewardmath": (48, 483)}
    run.metrics["benchmarks"] = {
        name: {"items": items, "official_items": official, "sample_fraction": items / official, "contaminated_items": ["a", "b"], "is_official": True}
        for name, (items, official) in about.items()
    }
    run.metrics |= {"judgebench/unscored": 4, "judgebench/clean/micro": 0.6, "judgebench/missing": {"claude/macro": "no item of claude/mmlu-pro"}}

    def add(path: str, value: float, verified: str) -> None:
        run.metrics.update({path: value, f"{path}/low": value - 0.03, f"{path}/high": value + 0.03, f"{path}/verified": verified})

    for name, estimate in rm_bench_estimates(random).items():
        add(f"rm_bench/{name}", estimate, RM_BENCH.verified_for(name).value)
    for name, value in {"micro": 0.61, "macro": 0.63}.items():
        add(f"judgebench/{name}", value, "official output" if name == "micro" else "hand-worked")
        add(f"judgebench/judge.judge-a/{name}", value - 0.05, "official output")
    for size in (1, 2, 4, 8, 10):
        add(f"rewardmath/best_of/{size}/model", 0.1 + 0.05 * size, "official output")
        add(f"rewardmath/best_of/{size}/oracle", min(1.0, 0.1 * size), "official output")
        add(f"rewardmath/best_of/{size}/random", 0.1, "official output")
    audit_metrics(run)
    run.finish()


def rm_bench_estimates(random: Random) -> dict[str, float]:
    """Return RM-Bench's metrics as its own code makes them, of rewards that a fancier style raises."""
    items, outcomes = [], []
    for number in range(240):
        pairs = tuple((right, 3 + wrong) for right in range(3) for wrong in range(3))
        item = Item(f"i{number}", user_message(f"question {number}"), tuple("abcdef"), pairs, DOMAINS[number % 4])
        items.append(item)
        outcomes.append(outcome_of_scores(item, [(place < 3) * 0.8 + 0.5 * (place % 3) + random.gauss(0, 1) for place in range(6)]))
    return point_values(measure_rm_bench(items, outcomes))


def audit_metrics(run: Run) -> None:
    """Add what audits of a model on one benchmark measure, by their own functions over margins drawn by chance."""
    report, generator = AuditReport(), np.random.default_rng(0)
    margins, lengths = generator.normal(0.5, 1.5, 300), generator.normal(0.2, 1.0, (300, 3))
    texts = [("better " * max(1, int(40 + 20 * row[0])), "worse " * 40) for row in lengths]
    items = [Item(f"i{place}", ({"role": "user", "content": f"question {place}"},), pair, ((0, 1),)) for place, pair in enumerate(texts)]
    outcomes = [outcome_of_scores(item, [margin, 0.0]) for item, margin in zip(items, margins, strict=True)]
    found = comparisons_of(items, outcomes)
    config = AuditConfig(num_resamples=50)
    _calibration(report, {"judgebench": found}, config)
    _note_biases(report, "audit/bias/judgebench", audit_biases(found, num_resamples=50))
    for kind in ("flattery", "gibberish"):
        measured = measure_hack(generator.normal([1.0, 0.0, 0.4], 0.6, (60, 3)), [f"p{place}" for place in range(60)], num_resamples=50)
        _note_hack(report, f"audit/attacks/corpus/{kind}", "corpus", kind, measured)
    run.metrics |= report.metrics


def attack_run(storage: Storage) -> None:
    """Write an attack on judges in which nothing was judged: every share is empty."""
    run = Run(storage, "attack", Settings())
    run.metrics["attack"] = {"simulated_gold": True, "judges": attack_report({"judge-a": []})}
    run.finish()


def demo_run(storage: Storage, decisions: pa.Table, random: Random) -> None:
    """Write the final report of a demo whose truth agrees with seven labels of ten."""
    run = Run(storage, "demo", Settings())
    for number in range(3):
        run.step(
            f"judge (judge-a), round {number}", rows=120, computed=120, rejected={}, seconds=60.0 + number, prompt_tokens=50_000, output_tokens=400
        )
    run.step("score, both RMs", rows=240, computed=240, rejected={}, seconds=48.0)
    truth = ["chosen" if random.random() < 0.7 else "rejected" for _ in range(decisions.num_rows)]
    flags = {name: np.array([[random.random() < share for _ in range(100)]]) for name, share in (("curated", 0.78), ("raw", 0.69))}
    run.metrics["demo"] = {
        "labels": asdict(label_quality(decisions["decision"].to_pylist(), truth)),
        "held_out": {name: [asdict(bootstrap_accuracy(values[0], num_resamples=500))] for name, values in flags.items()},
        "curated_minus_raw": asdict(paired_bootstrap(flags["curated"], flags["raw"], num_resamples=500)),
        "gold_share": 0.15,
    }
    run.finish()


def annotate_run(storage: Storage) -> None:
    """Write a status of the annotation app."""
    run = Run(storage, "annotate", Settings())
    agreement = {"num_votes": 90, "num_shared_pairs": 30, "percent_agreement": 0.83, "krippendorff_alpha": 0.66, "cohen_kappa": None}
    run.metrics["annotation"] = {
        "standings": {"settled": 55, "disputed": 5},
        "to_adjudicate": 5,
        "agreement": {"all": agreement, "math": agreement},
        "annotators": {"ann": {"verdicts": 50, "quality": 0.9}, "bob": {"verdicts": 40, "quality": None}},
    }
    run.finish()
