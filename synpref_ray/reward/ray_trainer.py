"""The trainer on a cluster: Ray Train places, connects and replaces the workers, DeepSpeed holds optimizer state (Paper: App. E: ZeRO-1).

The driver plans the batches once and hands out their address; every worker fetches its own micro-batches. A lost worker makes Ray Train start
the group again, and the new one goes on from the last checkpoint in the run's folder; so does a new driver. Every node must see that folder.
"""

import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from synpref_ray import errors
from synpref_ray.bundled import resolve_model
from synpref_ray.errors import ConfigError, InputError, NonFiniteLossError, SynprefError
from synpref_ray.priority import MODEL_ENVIRONMENT
from synpref_ray.reward.checkpoints import TrainingFolder
from synpref_ray.reward.communication_op import drop_stale_locks, extensions_environment
from synpref_ray.reward.model import RewardModule, load_tokenizer
from synpref_ray.reward.render import choose_pad_token
from synpref_ray.reward.trainer import TrainingRun, TrainingWatcher, build_module, make_record, train_tables, weights_writer
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_data import TrainingData
from synpref_ray.reward.training_record import TrainingRecord

logger = logging.getLogger(__name__)


def train_reward_model(train: pa.Table, gold: pa.Table | None, config: TrainConfig, output_dir: str, storage_dir: str) -> TrainingRecord:
    """Train one reward model with Ray Train and DeepSpeed on pairs that fit in memory, and write it to `output_dir`, all at once.

    Args:
        train: pairs with pair_id, prompt, chosen, rejected; chosen is the preferred reply (flips already applied).
        gold: pairs that choose the checkpoint, never trained on; None keeps the last step.
        output_dir: a new folder that every worker sees; a killed run goes on from `<output_dir>.training`.
        storage_dir: where Ray Train keeps its own state.

    Raises:
        RunConflictError: `output_dir` is already there.
        InputError: nothing to train on, or a loss that is not finite.
    """
    return train_tables(train, gold, config, output_dir, lambda data, config, folder: run_on_ray(data, config, folder, storage_dir))


def run_on_ray(
    data: TrainingData, config: TrainConfig, folder: TrainingFolder, storage_dir: str, watch: TrainingWatcher | None = None
) -> TrainingRecord:
    """Train on prepared data and leave the kept weights in `folder`; arguments and errors as `train_reward_model`. `watch` goes to the workers."""
    if not ray.is_initialized():
        ray.init()
    settings = {"config": config.model_dump_json(), "data": ray.put(data), "folder": ray.put(folder), "watch": watch, "start": time.time()}
    # The static types of ray.train are those of its first version; the second, which runs, knows these settings and returns a value.
    run_config: dict[str, Any] = {"name": f"{Path(folder.path).name}-{uuid.uuid4().hex[:8]}", "storage_path": storage_dir}
    run_config["worker_runtime_env"] = {"env_vars": _environment(config)}
    run_config["failure_config"] = FailureConfig(max_failures=config.max_failures)
    loop: Any = _train_worker
    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu),
        run_config=RunConfig(**run_config),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from error
    answer = json.loads(result.return_value)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return TrainingRecord.model_validate_json(result.return_value)


def _train_worker(settings: dict[str, Any]) -> str | None:
    """Run on every worker; rank 0 returns the training record, or an error that all ranks meet and no restart would mend, as JSON."""
    began = time.time()
    config = TrainConfig.model_validate_json(settings["config"])
    data: TrainingData = ray.get(settings["data"])
    folder: TrainingFolder = ray.get(settings["folder"])
    failed = ""
    try:
        module, tokenizer = _load(config)
        data.open()  # a rank that cannot read the batches must say so before the others wait for it
    except (InputError, ConfigError) as error:
        failed = _as_json(error)
    if failed := _first_of_all_ranks(failed):
        return failed
    run = _make_run(module, tokenizer, config, data, folder)
    run.watch = settings["watch"]
    loaded = time.time() - began
    logger.info("rank %d of %d on %s: %.1f s", run.engine.rank, run.engine.world_size, run.engine.device, loaded)
    try:
        run.run()
    except NonFiniteLossError as error:
        return _as_json(error)
    if run.engine.rank != 0:
        return None
    return make_record(run, {"startup": began - settings["start"], "load": loaded}).model_dump_json()


def _load(config: TrainConfig) -> tuple[RewardModule, Any]:
    if not config.use_gpu:
        torch.set_num_threads(config.num_threads)
        drop_stale_locks()
    module = build_module(config).to(ray.train.torch.get_device())
    tokenizer = load_tokenizer(resolve_model(config.backbone))
    choose_pad_token(tokenizer)
    return module, tokenizer


def _first_of_all_ranks(failed: str) -> str:
    """Return the first error of any rank, the same on all of them: a rank that left alone would let the others wait for it."""
    answers: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, failed)
    return next((answer for answer in answers if answer), "")


def _make_run(module: RewardModule, tokenizer: Any, config: TrainConfig, data: TrainingData, folder: TrainingFolder) -> TrainingRun:
    from synpref_ray.reward.deepspeed_engine import DeepSpeedEngine  # here, so that the driver never pays for it (4 s)

    engine = DeepSpeedEngine(module, config)
    return TrainingRun(module, data, config, engine, folder, weights_writer(module, tokenizer, config), ray.train.report)


def _as_json(error: SynprefError) -> str:
    return json.dumps({"error": type(error).__name__, "message": str(error)})


def _environment(config: TrainConfig) -> dict[str, str]:
    """Workers share cores: OpenMP threads must not spin while they wait (168 against 45 tokens/s in a trial on two busy cores)."""
    if config.use_gpu:
        return MODEL_ENVIRONMENT
    return {**MODEL_ENVIRONMENT, "OMP_NUM_THREADS": str(config.num_threads), "OMP_WAIT_POLICY": "PASSIVE", **extensions_environment()}


def _cause(error: TrainingFailedError) -> Exception:
    """Return our own error if one of the workers raised it (they all raise the same), else Ray's."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        for candidate in (failure, failure.__cause__, getattr(failure, "cause", None)):
            if isinstance(candidate, SynprefError):
                return candidate
    return error
