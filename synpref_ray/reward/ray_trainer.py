"""The trainer on a cluster: Ray Train places and connects the workers, DeepSpeed holds optimizer state (Paper: App. E: DeepSpeed ZeRO-1).

The driver tokenises once and puts the flat arrays into the object store; every worker maps them and computes the same plan, so no data
moves during training. Rank 0 writes the kept weights; the folder gets its name when it is whole. Every node must see `output_dir`.
"""

import logging
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from torch import nn

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import SynprefError
from synpref_ray.reward.model import RewardModule, load_tokenizer
from synpref_ray.reward.render import choose_pad_token
from synpref_ray.reward.trainer import (
    TrainingData,
    TrainingRun,
    build_module,
    make_record,
    parameter_groups,
    prepare_data,
    publish,
    saver,
    staging_folder,
)
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_record import TrainingRecord

logger = logging.getLogger(__name__)

REDUCE_BUCKET_ELEMENTS = 50_000_000  # ours: DeepSpeed's default of 500 million would hold 2 GB of gradients beside those of the model


def train_reward_model(train: pa.Table, gold: pa.Table | None, config: TrainConfig, output_dir: str, storage_dir: str) -> TrainingRecord:
    """Train one reward model with Ray Train and DeepSpeed and write it to `output_dir`, all at once.

    Args:
        train: pairs with pair_id, prompt, chosen, rejected; chosen is the preferred reply (flips already applied).
        gold: pairs that choose the checkpoint, never trained on; None keeps the last step.
        output_dir: new folder: model, tokenizer and training_record.json. A local path that every node of the cluster sees.
        storage_dir: where Ray Train keeps its own state.

    Raises:
        InputError: nothing to train on, no such backbone, or a loss that is not finite.
        RunConflictError: `output_dir` exists already.
    """
    start = time.perf_counter()
    staging = staging_folder(output_dir)
    data = prepare_data(load_tokenizer(resolve_model(config.backbone)), train, gold, config)
    loop_config = {"config": config.model_dump_json(), "data": ray.put(data), "staging": str(staging), "start": time.time()}
    # The static types of ray.train are those of its first version; the second, which runs, knows these settings and returns a value.
    run_config: dict[str, Any] = {"name": f"{Path(output_dir).name}-{uuid.uuid4().hex[:8]}", "storage_path": storage_dir}
    run_config["worker_runtime_env"] = {"env_vars": _environment(config)}
    loop: Any = _train_worker
    trainer = TorchTrainer(
        loop,
        train_loop_config=loop_config,
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu),
        run_config=RunConfig(**run_config),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from error
    record = TrainingRecord.model_validate_json(result.return_value)
    record = record.model_copy(update={"seconds": {**record.seconds, "total": time.perf_counter() - start}})
    publish(staging, record, output_dir)
    return record


class DeepSpeedEngine:
    """The loop's engine over DeepSpeed: float32 parameters, ZeRO stage 0, 1 or 2, torch's AdamW."""

    def __init__(self, module: RewardModule, config: TrainConfig):
        import deepspeed  # here, so that the driver never pays for it (4 s)

        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = next(module.parameters()).device
        groups = parameter_groups(module, config)
        self._rates = [group["lr"] for group in groups]
        self._zero_stage = config.zero_stage
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=torch.optim.AdamW(groups), config=deepspeed_config(config), dist_init_required=False
        )

    def forward(self, batch: Any) -> torch.Tensor:
        rewards: torch.Tensor = self._engine(batch)
        return rewards

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)  # DeepSpeed averages over ranks; the loop wants the sum

    def step(self, learning_rate_factor: float) -> float:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate_factor
        norm = self._gradient_norm() if self._zero_stage == 0 else None
        self._engine.step()
        return float(norm if norm is not None else self._engine.get_global_grad_norm())

    def _gradient_norm(self) -> torch.Tensor:
        """Without ZeRO in float32 DeepSpeed clips but does not tell the norm; the gradients are the averaged ones by now."""
        gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.SUM)
        return values

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's settings. Batches and accumulation are the loop's business, so both are 1 here."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False, "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS},
        "steps_per_print": 2**31,
    }


def _train_worker(settings: dict[str, Any]) -> str | None:
    """Run on every worker; rank 0 returns the training record as JSON."""
    began = time.time()
    config = TrainConfig.model_validate_json(settings["config"])
    data: TrainingData = ray.get(settings["data"])
    if not config.use_gpu:
        torch.set_num_threads(config.num_threads)
    device = ray.train.torch.get_device()
    module = build_module(config).to(device)
    engine = DeepSpeedEngine(module, config)
    loaded = time.time() - began
    logger.info(
        "rank %d of %d on %s: started in %.1f s, loaded in %.1f s",
        engine.rank,
        engine.world_size,
        device,
        began - settings["start"],
        loaded,
    )
    tokenizer = load_tokenizer(resolve_model(config.backbone))
    choose_pad_token(tokenizer)
    save = saver(module, tokenizer, Path(settings["staging"]), config)
    run = TrainingRun(module, data, config, engine, save if engine.rank == 0 else lambda: None, ray.train.report)
    run.run()
    if engine.rank != 0:
        return None
    return make_record(run, {"startup": began - settings["start"], "load": loaded}).model_dump_json()


def _environment(config: TrainConfig) -> dict[str, str]:
    """Workers share cores: OpenMP threads must not spin while they wait (168 against 45 tokens/s in a trial on two busy cores)."""
    return {} if config.use_gpu else {"OMP_NUM_THREADS": str(config.num_threads), "OMP_WAIT_POLICY": "PASSIVE"}


def _cause(error: TrainingFailedError) -> Exception:
    """Return our own error if one of the workers raised it (they all raise the same), else Ray's."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    for failure in failures:
        for candidate in (failure, failure.__cause__, getattr(failure, "cause", None)):
            if isinstance(candidate, SynprefError):
                return candidate
    return error
