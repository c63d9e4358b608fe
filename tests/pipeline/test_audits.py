"""Audits on a tiny model: numbers and tables are there, a second run asks the model nothing, and two models are compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from synpref_ray.errors import ConfigError
from synpref_ray.evaluation.benchmarks.core import ReadItems
from synpref_ray.evaluation.reliability.attacks import KINDS
from synpref_ray.evaluation.reliability.suffix_search import SearchConfig
from synpref_ray.pipeline.audits import AuditConfig, printable_tokens
from synpref_ray.pipeline.benchmark_files import LoadedBenchmark, benchmark_of_file
from synpref_ray.pipeline.evaluate import EvaluateConfig, check_evaluate, run_evaluate
from synpref_ray.pipeline.gold_benchmark import gold_items
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.reporting.run import Run
from synpref_ray.reward.model import load_tokenizer
from synpref_ray.tables.storage import Storage
from tests.reward.conftest import save_tiny_backbone

INLINE = ScoreConfig(dtype="float32", max_length_tokens=2000, max_tokens_per_batch=4000, num_threads=1, num_workers=0)
SMALL = AuditConfig(attack_pairs=3, search_starts=2, search=SearchConfig(suffix_tokens=2, questions=8, candidates=3), num_resamples=20)


@pytest.fixture(scope="module", name="models")
def make_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        save_tiny_backbone(folder, head=True, seed=seed)
        folders.append(str(folder))
    return folders


@pytest.fixture(name="data")
def write_data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"right **{n}** " + "word " * (n % 7), "rejected": f"wrong {n} " + "- word\n" * (n % 5)}
        for n in range(24)
    ]
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    folder = tmp_path / "rm_bench"
    folder.mkdir()
    chat = [{"id": n, "prompt": f"Ask {n}?", "chosen": [f"a{n}", f"bb{n}", f"# c{n}"], "rejected": [f"x{n}", f"yy{n}", f"# z{n}"]} for n in range(4)]
    (folder / "chat_filtered.json").write_text(json.dumps(chat))
    return tmp_path


@pytest.fixture(name="evaluate")
def make_evaluate(tmp_path: Path, models: list[str], data: Path) -> Callable[..., tuple[Run, str]]:
    def evaluate(**settings: Any) -> tuple[Run, str]:
        values = {"model": models[0], "benchmarks": ("held_out", "rm_bench"), "data": str(data), "score": INLINE, "audit": SMALL, "num_resamples": 20}
        config = EvaluateConfig(workspace=str(tmp_path / "ws"), **{**values, **settings})
        check_evaluate(config)
        run = Run(Storage(config.workspace), "evaluate", config)
        table = run_evaluate(config, run)
        json.dumps(run.metrics, allow_nan=False)
        return run, table

    return evaluate


def test_all_audits_and_a_second_run_that_asks_nothing(evaluate: Callable[..., tuple[Run, str]]) -> None:
    run, table = evaluate(audits=("calibration", "bias", "attacks"))
    metrics = run.metrics
    assert metrics["audit/calibration/held_out/pairs"] == 24
    assert metrics["audit/calibration/rm_bench/pairs"] == 36
    assert 0 <= metrics["audit/calibration/held_out/ece"] <= 1
    assert metrics["audit/calibration/rm_bench/by_group/chat/num_pairs"] == 36
    assert {one["mitigated"] for one in metrics["audit/bias/held_out/mitigations"]} >= {"length", "markdown", "all"}
    assert "audit/bias/rm_bench/styles/markdown_over_concise" in metrics
    for name, replies in (("corpus", 20), ("held_out", 3), ("rm_bench", 3)):
        assert all(metrics[f"audit/attacks/{name}/{kind}/replies"] == replies for kind in KINDS)
    assert metrics["audit/attacks/suffix/worse/rise"] >= metrics["audit/attacks/suffix/worse/random_rise"]
    assert metrics["audit/attacks/suffix/questions"] <= 2 * 2 * 9
    assert all(word in table for word in ("calibration", "mitigation", "hacked beats better", "suffix search behind"))

    again, table_again = evaluate(audits=("calibration", "bias", "attacks"))
    assert again.metrics["replies"]["computed"] == again.metrics["audit/attacks/replies"]["computed"] == 0
    assert [step["computed"] for step in again.steps] == [0]
    assert table_again == table


def test_two_models_are_tested_against_each_other(evaluate: Callable[..., tuple[Run, str]], models: list[str]) -> None:
    run, table = evaluate(compare=(models[1],), model_seeds=(models[1],))
    assert run.metrics["audit/compare/held_out/seeds"] == [2, 1]
    assert 0 < run.metrics["audit/compare/held_out/p_value"] <= 1
    assert "McNemar" in table
    same, _ = evaluate(compare=(models[0],))
    assert same.metrics["audit/compare/rm_bench/difference"] == 0
    assert same.metrics["audit/compare/rm_bench/p_value"] == 1


def test_too_few_pairs_are_said(evaluate: Callable[..., tuple[Run, str]], data: Path) -> None:
    (data / "few.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}))
    run, _ = evaluate(benchmarks=("few",), audits=("bias",))
    assert "20 or more are needed" in run.metrics["audit/bias/few/missing"]


def test_audits_need_a_model() -> None:
    with pytest.raises(ConfigError, match="name a model"):
        check_evaluate(EvaluateConfig(benchmarks=("x",), audits=("bias",)))


def test_a_vocabulary_prints(models: list[str]) -> None:
    tokenizer = load_tokenizer(models[0])
    texts = printable_tokens(tokenizer)
    assert texts
    assert not set(texts) & set(tokenizer.all_special_tokens)
    assert all(text.strip() and text.isprintable() for text in texts)


def test_accuracy_by_attribute(evaluate: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gold rows as a finished Stage 1 leaves them; only the reading of its record is replaced."""
    rows = [
        {"pair_id": f"g{n}", "prompt": [{"role": "user", "content": f"Gold {n}?"}], "chosen": f"one {n}", "rejected": f"two {n}"}
        | {"human_verdict": "chosen" if n % 2 else "rejected", "gold_split": "audit" if n < 6 else "working"}
        | {"task_category": "Math" if n < 4 else None, "objectivity": "objective", "controversiality": "low"}
        for n in range(8)
    ]
    items = gold_items(rows)
    assert [item.replies for item in items[:2]] == [("two 0", "one 0"), ("one 1", "two 1")]
    assert len(items) == 6
    loaded = LoadedBenchmark("audit_gold", benchmark_of_file("audit_gold", many=False), ReadItems(items), is_pair_file=True)
    monkeypatch.setattr("synpref_ray.pipeline.evaluate.audit_gold", lambda _: loaded)
    run, _ = evaluate(audits=("calibration",), audit_gold=True)
    prefix = "audit/calibration/audit_gold"
    assert run.metrics[f"{prefix}/by_task_category/Math/num_pairs"] == 4
    assert run.metrics[f"{prefix}/by_task_category/unknown/num_pairs"] == 2
    assert run.metrics[f"{prefix}/by_objectivity/objective/num_pairs"] == 6
    assert run.metrics["audit_gold/num_pairs"] == 6


def test_seeds_without_another_model_are_refused(evaluate: Callable[..., tuple[Run, str]], models: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model_seeds .*compare="):
        evaluate(model_seeds=(models[1],))


def test_attacks_are_written_shard_by_shard_as_set(evaluate: Callable[..., tuple[Run, str]], tmp_path: Path) -> None:
    run, _ = evaluate(audits=("attacks",), audit=SMALL.model_copy(update={"search_starts": 0}), benchmarks=("held_out",), replies_per_shard=16)
    rows = [pq.ParquetFile(file).metadata.num_rows for file in (tmp_path / "ws" / "scores").rglob("rewards.*/*/shard-*.parquet")]
    assert sum(rows) == run.metrics["replies"]["computed"] + run.metrics["audit/attacks/replies"]["computed"]
    assert max(rows) <= 16


def test_the_level_of_intervals_is_that_of_the_evaluation(evaluate: Callable[..., tuple[Run, str]]) -> None:
    wide, narrow = (evaluate(audits=("calibration", "bias"), confidence=level)[0].metrics for level in (0.95, 0.2))
    names = ("calibration/held_out/ece", "bias/held_out/length/pressure", "bias/held_out/length/accuracy_more", "calibration/held_out/overconfidence")
    for name in names:
        widths = [metrics[f"audit/{name}/high"] - metrics[f"audit/{name}/low"] for metrics in (wide, narrow)]
        assert widths[1] < widths[0], name
