"""The sides of `llm.py`, each for a process of its own: our step over Ray, bare vLLM, and Ray's own batch inference.

Every side notes when its first request went out, where that happens, and when its last reply was there; none is found by a difference.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks._llm import Setup, load_prompts, open_tables
from synpref_ray.bundled import resolve_model
from synpref_ray.llm.engine import EngineConfig, Reply, Request, engine_environment
from synpref_ray.llm.vllm_engine import VllmEngine
from synpref_ray.pipeline import judge_steps, tag_steps
from synpref_ray.pipeline.cluster import RayConfig, local_ray_settings, ray_session
from synpref_ray.priority import MODEL_ENVIRONMENT
from synpref_ray.reporting.run import Run
from synpref_ray.tables.storage import Storage

NOTES = "SYNPREF_BENCHMARK_NOTES"  # the file that the workers of this process note into; Ray's workers inherit it


def note(event: str, **fields: Any) -> None:
    """Append an event with its time, its process and that one's CPU seconds; one short write, so that processes may share the file."""
    line = json.dumps({"event": event, "time": time.time(), "cpu": time.process_time(), "pid": os.getpid(), **fields})
    with open(os.environ[NOTES], "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_notes(lines: Sequence[str]) -> dict[str, Any]:
    """Return when the first request went out, how many engines started in how many processes and how long that took, what the engines' processes
    computed from their first request to their last counts, and these counts.
    """
    notes = [json.loads(line) for line in lines]
    starts = [one for one in notes if one["event"] == "start"]
    counts = {one["pid"]: one["counts"] for one in notes if one["event"] == "counts"}  # the last of each engine
    begun = {one["pid"]: one["cpu"] for one in reversed(notes) if one["event"] == "request"}
    ended = {one["pid"]: one["cpu"] for one in notes if one["event"] == "counts"}
    return {
        "first_request": min(one["time"] for one in notes if one["event"] == "request"),
        "engine_cpu_seconds": sum(ended[pid] - begun[pid] for pid in ended),
        "engine_starts": len(starts),
        "engine_start_seconds": max(one["seconds"] for one in starts),
        "counts": {name: sum(one[name] for one in counts.values()) for name in next(iter(counts.values()), {})},
    }


def note_engines() -> None:
    """Let every `VllmEngine` of this process note its start, the moment a caller sends requests, and its counts."""
    start, generate = VllmEngine.__init__, VllmEngine.generate

    def noted_start(self: VllmEngine, *args: Any, **kwargs: Any) -> None:
        began = time.time()
        start(self, *args, **kwargs)
        note("start", seconds=time.time() - began)

    def noted_generate(self: VllmEngine, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[Reply]:
        note("request")
        try:
            return generate(self, requests, *args, **kwargs)
        finally:
            note("counts", counts=asdict(self.counts()))

    VllmEngine.__init__ = noted_start  # type: ignore[method-assign]
    VllmEngine.generate = noted_generate  # type: ignore[method-assign]


class NotedTagWorker(tag_steps.TagWorker):
    """The step's worker; its engine notes."""

    def __init__(self, *args: Any, **kwargs: Any):
        note_engines()
        super().__init__(*args, **kwargs)


class NotedJudgeWorker(judge_steps.JudgeWorker):
    """The step's worker; its engine notes."""

    def __init__(self, *args: Any, **kwargs: Any):
        note_engines()
        super().__init__(*args, **kwargs)


def run_step_side(task: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """Run the pipeline's own step over a fresh copy of the workspace, to the seal of its sidecar."""
    tag_steps.TagWorker, judge_steps.JudgeWorker = NotedTagWorker, NotedJudgeWorker  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[NOTES] = f"{scratch}/notes.jsonl"
        shutil.copytree(folder / "workspace", f"{scratch}/workspace")
        storage = Storage(f"{scratch}/workspace")
        targets, judged, gold = open_tables(storage)
        with ray_session(RayConfig(dashboard=False), storage):
            if task == "tag":
                tagged = tag_steps.tag_pools(Run(storage, "benchmark", setup.tag), "tag", [targets], [setup.tag])
                [sidecar] = tagged.by_tagger[setup.tag.tagger.name]
            else:
                [sidecar] = judge_steps.judge_pools(Run(storage, "benchmark", setup.judge), "judge", [judged], gold, setup.judge)
        seen = read_notes(Path(os.environ[NOTES]).read_text(encoding="utf-8").splitlines())
        journals = sorted(Path(scratch).glob("workspace/pools/*/*/*/journal/*/*.jsonl"))
        written = max(shard.stat().st_mtime for table in {file.parents[2] for file in journals} for shard in table.glob("shard-*.parquet"))
        sealed = Path(storage.local_path(f"{sidecar.folder}/manifest.json")).stat().st_mtime
        replies = [json.loads(line) for file in journals for line in file.read_text(encoding="utf-8").splitlines()]
        counts = seen["counts"]
        return {
            "seconds": sealed - seen["first_request"],
            "seconds_to_last_shard": written - seen["first_request"],
            "startup_seconds": seen["first_request"] - psutil.Process().create_time(),
            "engine_start_seconds": seen["engine_start_seconds"],
            "engine_starts_per_worker": seen["engine_starts"] / (setup.tag if task == "tag" else setup.judge).num_workers,
            "engine_cpu_seconds": seen["engine_cpu_seconds"],
            "requests": counts["replies"],
            "prompt_tokens": counts["prompt_tokens"],
            "cached_prompt_tokens": counts["cached_prompt_tokens"],
            "output_tokens": counts["output_tokens"],
            "replies": {reply["key"]: reply["text"] for reply in replies},
        }


def engine_arguments(config: EngineConfig) -> dict[str, Any]:
    """Return `config` by vLLM's names, as `VllmEngine` starts it on a CPU."""
    from vllm.config import StructuredOutputsConfig

    return {
        "dtype": config.dtype,
        "max_model_len": config.max_model_len_tokens,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_batched_tokens,
        "enforce_eager": config.enforce_eager,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": config.prefix_caching,
        "generation_config": "vllm",
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        "seed": config.seed,
        "disable_log_stats": True,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
    }


def run_bare_side(task: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """Give all prompts at once to `vllm.LLM.generate` in this very process; nothing is stored."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    config, prompts = setup.engine(task), load_prompts(folder, task)
    torch.set_num_threads(config.num_threads)
    began = time.time()
    llm: Any = LLM(resolve_model(config.model), **engine_arguments(config))
    started = time.time() - began
    sampling = []
    for prompt in prompts:
        rest = {name: value for name, value in prompt.sampling.items() if name != "structured_outputs"}
        sampling.append(SamplingParams(**rest, structured_outputs=StructuredOutputsParams(**prompt.sampling["structured_outputs"])))
    first, cpu = time.time(), time.process_time()
    outputs = llm.generate([{"prompt_token_ids": prompt.tokens} for prompt in prompts], sampling, use_tqdm=False)
    seconds, cpu = time.time() - first, time.process_time() - cpu
    return {
        "seconds": seconds,
        "engine_cpu_seconds": cpu,
        "startup_seconds": first - psutil.Process().create_time(),
        "engine_start_seconds": started,
        "engine_starts_per_worker": 1.0,
        "requests": len(outputs),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "cached_prompt_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "replies": {prompt.key: output.outputs[0].text for prompt, output in zip(prompts, outputs, strict=True)},
    }


def run_ray_data_side(task: str, folder: Path, setup: Setup, batch_size: int, concurrent_batches: int) -> dict[str, Any]:
    """Run the prompts through `ray.data.llm` into Parquet files; its engine is a child process of one actor, as it starts it itself."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    class NotedUDF(vLLMEngineStageUDF):
        def __init__(self, *args: Any, **kwargs: Any):
            began = time.time()
            super().__init__(*args, **kwargs)
            note("start", seconds=time.time() - began)

        async def udf(self, batch: list[dict[str, Any]]) -> Any:
            note("request")
            async for reply in super().udf(batch):
                yield reply

    config = setup.engine(task)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[NOTES] = f"{scratch}/notes.jsonl"
        settings = local_ray_settings(dashboard=False)  # as the step's session has them
        ray.init(address="local", num_cpus=RayConfig().num_cpus, include_dashboard=False, logging_level=logging.WARNING, _system_config=settings)
        processor_config = vLLMEngineProcessorConfig(
            model_source=resolve_model(config.model),
            engine_kwargs=engine_arguments(config),
            batch_size=batch_size,
            max_concurrent_batches=concurrent_batches,
            concurrency=1,
            runtime_env={
                "env_vars": {**MODEL_ENVIRONMENT, **engine_environment(config)}
            },  # with it the engine's child runs the model itself, not yet another child
            placement_group_config={"bundles": [{"CPU": 1}]},
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,  # the engine detokenises: one actor fewer on a small machine
            log_engine_metrics=False,
        )
        processor = build_processor(processor_config, preprocess=_to_ray_data, postprocess=_from_ray_data)
        stage = processor.get_stage_by_name("vLLMEngineStage")
        processor.stages["vLLMEngineStage"] = stage.model_copy(update={"fn": NotedUDF})  # assigning would validate anew and ask for a GPU
        processor(ray.data.read_parquet(str(folder / task))).write_parquet(f"{scratch}/out")
        written = max(file.stat().st_mtime for file in Path(f"{scratch}/out").glob("*.parquet"))
        rows = ray.data.read_parquet(f"{scratch}/out").take_all()
        below = psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in psutil.wait_procs(below, timeout=30)[1]:  # an engine that outlives its actor must not run beside the next side
            process.kill()
        seen = read_notes(Path(os.environ[NOTES]).read_text(encoding="utf-8").splitlines())
    return {
        "seconds": written - seen["first_request"],
        "startup_seconds": seen["first_request"] - psutil.Process().create_time(),
        "engine_start_seconds": seen["engine_start_seconds"],
        "engine_starts_per_worker": float(seen["engine_starts"]),  # concurrency=1
        "requests": len(rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "output_tokens": sum(row["output_tokens"] for row in rows),
        "replies": {row["key"]: row["text"] for row in rows},
    }


def _to_ray_data(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokenized_prompt": row["tokens"], "sampling_params": json.loads(row["sampling"])}


def _from_ray_data(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": row["key"],
        "text": row["generated_text"],
        "prompt_tokens": row["num_input_tokens"],
        "output_tokens": row["num_generated_tokens"],
    }
