"""Training a Bradley-Terry reward model: the core loop, which runs in one process without Ray (Paper: Sec. 3.2, Step 1; Sec. 4; App. E).

The loop knows an engine only by `forward`, `backward`, `step` and two reductions: `PlainEngine` is PyTorch alone, `DeepSpeedEngine` (in
`ray_trainer`) DeepSpeed on a cluster. The loss is divided by the number of pairs of the global batch, so neither micro-batches nor ranks
change the result.

Shape legend: P pairs.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import nn

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import InputError, RunConflictError
from synpref_ray.reward.loss import bradley_terry_loss
from synpref_ray.reward.model import RewardModule, load_backbone_with_head, load_tokenizer, save_reward_model
from synpref_ray.reward.packing import Group, PackingStats, pack, packing_stats
from synpref_ray.reward.render import RenderedPairs, choose_pad_token, render_pairs, template_digest
from synpref_ray.reward.scorer import RECORD_FILE, make_pair_group
from synpref_ray.reward.training_config import TrainConfig as TrainConfig
from synpref_ray.reward.training_plan import evaluation_steps, learning_rate_factor, plan_epoch, plan_ranks
from synpref_ray.reward.training_record import EvaluationRecord, StepRecord, TrainingRecord
from synpref_ray.versions import package_versions

logger = logging.getLogger(__name__)


class TrainingEngine(Protocol):
    """What the loop needs of whatever holds the weights."""

    rank: int
    world_size: int
    device: torch.device

    def forward(self, batch: Any) -> torch.Tensor:
        """Return the rewards of a packed micro-batch, differentiably."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`: they add up over the ranks and micro-batches of a step. `last`: the rank's last one of the step."""

    def step(self, learning_rate_factor: float) -> float:
        """Clip, update, clear the gradients; return the gradients' norm before clipping."""

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise sum over ranks."""

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the element-wise maximum over ranks."""


class PlainEngine:
    """One process, AdamW, nothing else."""

    rank = 0
    world_size = 1

    def __init__(self, module: RewardModule, config: TrainConfig):
        self.device = next(module.parameters()).device
        self._module = module
        self._optimizer = torch.optim.AdamW(parameter_groups(module, config))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._max_grad_norm = config.max_grad_norm

    def forward(self, batch: Any) -> torch.Tensor:
        rewards: torch.Tensor = self._module(batch)
        return rewards

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate_factor: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._max_grad_norm)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate_factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        return values


@dataclass(frozen=True)
class TrainingData:
    """The rendered pairs to train on, those to choose the checkpoint by (None: keep the last step), and what they were rendered with."""

    train: RenderedPairs
    gold: RenderedPairs | None
    template_digest: str


@dataclass
class TrainingRun:
    """One run's state: what the loop reads and what it has measured."""

    module: RewardModule
    data: TrainingData
    config: TrainConfig
    engine: TrainingEngine
    save: Callable[[], None]
    report: Callable[[dict[str, float]], None] = lambda metrics: None

    def __post_init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationRecord] = []
        self.best: EvaluationRecord | None = None
        self.stats = PackingStats(0, 0, 0, 0)
        self.seconds = dict.fromkeys(("train", "evaluate", "save"), 0.0)

    def run(self) -> None:
        """Train for the configured epochs and leave the kept weights with `save`.

        Raises:
            InputError: a loss is not finite; the weights saved last stay.
        """
        usable = self.data.train.usable()
        ids = [self.data.train.pair_ids[i] for i in usable]
        groups = [make_pair_group(self.module, self.data.train, i) for i in usable]
        config = self.config
        epochs = [plan_epoch(ids, seed=config.seed, epoch=epoch, global_batch_pairs=config.global_batch_pairs) for epoch in range(config.num_epochs)]
        batches = [batch for epoch in epochs for batch in epoch]
        evaluate_after = evaluation_steps(len(epochs[0]), config.num_epochs, config.evaluations_per_epoch)
        self.module.train()
        for step, batch in enumerate(batches, start=1):
            factor = learning_rate_factor(step, len(batches), schedule=config.schedule, warmup_fraction=config.warmup_fraction)
            self._train_step(step, step / len(epochs[0]), factor, [groups[i] for i in batch], [ids[i] for i in batch])
            if self.data.gold is not None and step in evaluate_after:
                self._evaluate_and_keep(step)
        if self.data.gold is None:
            self._save()

    @property
    def chosen_step(self) -> int:
        return self.best.step if self.best is not None else len(self.steps)

    def _train_step(self, step: int, epoch: float, factor: float, groups: Sequence[Group], ids: Sequence[str]) -> None:
        start = time.perf_counter()
        ranks = plan_ranks(groups, self.config.max_tokens_per_microbatch, self.engine.world_size)
        mine = ranks[self.engine.rank]
        pieces: list[torch.Tensor] = []
        for number, batch in enumerate(mine, start=1):
            rewards = self._forward_pairs([groups[i] for i in batch] or [min(groups, key=lambda group: group.row_tokens)])
            loss = bradley_terry_loss(rewards[:, 0], rewards[:, 1]).sum() * (1.0 if batch else 0.0)  # an empty micro-batch only keeps step
            self.engine.backward(loss / len(groups), last=number == len(mine))
            if batch:
                pieces.append(rewards.detach())
        rewards = torch.cat(pieces) if pieces else torch.zeros(0, 2, device=self.engine.device)
        metrics = self._pair_metrics(rewards)
        if not torch.isfinite(torch.tensor([metrics["loss"], metrics["max_reward"], metrics["min_reward"]])).all():
            raise InputError(self._not_finite(step, metrics["loss"], rewards, [ids[i] for batch in mine for i in batch]))
        norm = self.engine.step(factor)
        seconds = time.perf_counter() - start
        stats = packing_stats(groups, [batch for rank in ranks for batch in rank if batch])
        self.stats = PackingStats(*(a + b for a, b in zip(_counts(self.stats), _counts(stats), strict=True)))
        self.seconds["train"] += seconds
        self.steps.append(
            StepRecord(
                step=step, epoch=round(epoch, 4), num_pairs=len(groups), num_tokens=self.stats.sequence_tokens,
                learning_rate=self.config.learning_rate * factor, grad_norm=norm, seconds=seconds, **metrics,
                tokens_per_second=stats.sequence_tokens / seconds, unique_tokens_per_second=stats.unique_tokens / seconds,
            )
        )  # fmt: skip
        logger.info("step %d: loss %.4f, accuracy %.3f, %.1f s", step, metrics["loss"], metrics["accuracy"], seconds)

    def _forward_pairs(self, groups: Sequence[Group]) -> torch.Tensor:
        """Return the rewards of (chosen, rejected), shape (P, 2)."""
        return self.engine.forward(pack(groups).to(self.engine.device)).view(-1, 2)

    def _pair_metrics(self, rewards: torch.Tensor) -> dict[str, float]:
        """Return the means over the pairs of all ranks, from this rank's rewards (P, 2). Accuracy counts strictly greater rewards."""
        margin = rewards[:, 0] - rewards[:, 1]
        loss = bradley_terry_loss(rewards[:, 0], rewards[:, 1])
        sums = [loss.sum(), (margin > 0).sum(), margin.sum(), rewards.sum() / 2, torch.tensor(len(rewards), device=rewards.device)]
        total = self.engine.total(torch.stack([value.double() for value in sums])).tolist()
        lowest = torch.full((), float("inf"), device=rewards.device)
        ends = [(-rewards).amax() if len(rewards) else -lowest, rewards.amax() if len(rewards) else -lowest]
        minus_minimum, maximum = self.engine.maximum(torch.stack(ends).double()).tolist()
        means = [value / total[4] for value in total[:4]]
        named = dict(zip(("loss", "accuracy", "margin", "mean_reward"), means, strict=True))
        return {**named, "min_reward": -minus_minimum, "max_reward": maximum}

    def _not_finite(self, step: int, loss: float, rewards: torch.Tensor, ids: Sequence[str]) -> str:
        bad = [pair for pair, row in zip(ids, rewards.isfinite().all(dim=1).tolist(), strict=True) if not row][:3]
        where = f"pairs {', '.join(bad)}" if bad else "pairs of another worker"
        kept = f"the weights of step {self.best.step} are the last good ones" if self.best is not None else "no weights were kept yet"
        return f"the loss became {loss} in optimizer step {step} ({where}); {kept}; lower learning_rate, or look at these pairs"

    def _evaluate_and_keep(self, step: int) -> None:
        assert self.data.gold is not None
        start = time.perf_counter()
        usable = self.data.gold.usable()
        groups = [make_pair_group(self.module, self.data.gold, i) for i in usable]
        mine = plan_ranks(groups, self.config.max_tokens_per_microbatch, self.engine.world_size)[self.engine.rank]
        self.module.eval()
        with torch.inference_mode():
            pieces = [self.module(pack([groups[i] for i in batch]).to(self.engine.device)).view(-1, 2) for batch in mine if batch]
        self.module.train()
        metrics = self._pair_metrics(torch.cat(pieces) if pieces else torch.zeros(0, 2, device=self.engine.device))
        seconds = time.perf_counter() - start
        self.seconds["evaluate"] += seconds
        values = {name: metrics[name] for name in ("accuracy", "loss", "margin")}
        found = EvaluationRecord(step=step, num_pairs=len(usable), seconds=seconds, **values)
        self.evaluations.append(found)
        logger.info("step %d: gold accuracy %.4f, gold loss %.4f", step, found.accuracy, found.loss)
        self.report({"step": step, "train/loss": self.steps[-1].loss, "gold/accuracy": found.accuracy, "gold/loss": found.loss})
        if is_better(found, self.best):
            self.best = found
            self._save()

    def _save(self) -> None:
        start = time.perf_counter()
        self.save()
        self.seconds["save"] += time.perf_counter() - start


def is_better(found: EvaluationRecord, best: EvaluationRecord | None) -> bool:
    """Paper: Sec. 3.2, Step 1: the highest gold accuracy. Our choice: ties go to the lower gold loss, then to the earlier step."""
    return best is None or (found.accuracy, -found.loss) > (best.accuracy, -best.loss)


def parameter_groups(module: RewardModule, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters for AdamW: decayed matrices, undecayed norms and biases, and the head at its own rate."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "head": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kind = "head" if name == "model.score.weight" else "matrices" if parameter.ndim > 1 else "vectors"
            groups[kind].append(parameter)
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "head": 0.0}
    rate = {kind: config.learning_rate * (config.head_learning_rate_multiplier if kind == "head" else 1.0) for kind in groups}
    return [{"params": parameters, "lr": rate[kind], "weight_decay": decay[kind]} for kind, parameters in groups.items() if parameters]


def build_module(config: TrainConfig) -> RewardModule:
    """Load the model to train: float32 weights, autocast as configured, only the first layers if asked."""
    model = load_backbone_with_head(
        resolve_model(config.backbone),
        "float32",
        new_head=config.new_head,
        head_init_std=config.head_init_std,
        seed=config.seed,
        num_layers=config.num_layers,
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return RewardModule(model, torch.bfloat16 if config.precision == "bfloat16" else None)


def prepare_data(tokenizer: Any, train: pa.Table, gold: pa.Table | None, config: TrainConfig) -> TrainingData:
    """Render both tables and check that something is left of each.

    Raises:
        InputError: a table is empty, or every pair of it is too long.
    """
    rendered: dict[str, RenderedPairs] = {}
    for name, table in (("train", train), ("gold", gold)):
        if table is None:
            continue
        rendered[name] = render_pairs(tokenizer, table, config.max_length_tokens, config.over_long)
        if not rendered[name].usable():
            raise InputError(f"no {name} pair to use: {len(table)} given, dropped: {dict(count_dropped(rendered[name])) or 'none'}")
    return TrainingData(rendered["train"], rendered.get("gold"), template_digest(tokenizer))


def count_dropped(rendered: RenderedPairs | None) -> Counter[str]:
    """Count the pairs left out, by reason."""
    return Counter(reason for reason in (rendered.drop_reasons if rendered is not None else ()) if reason is not None)


def make_record(run: TrainingRun, seconds: dict[str, float]) -> TrainingRecord:
    """Put together what the run leaves beside its weights."""
    data, stats = run.data, run.stats
    return TrainingRecord(
        config=run.config, versions=package_versions(), template_digest=data.template_digest, shares_prefixes=run.module.may_share,
        num_pairs=len(data.train.usable()), num_dropped=dict(count_dropped(data.train)),
        num_shortened=len(data.train.shortened), num_spelled=len(data.train.spelled),
        num_gold_shortened=len(data.gold.shortened) if data.gold is not None else 0,
        num_gold_pairs=len(data.gold.usable()) if data.gold is not None else 0, num_gold_dropped=dict(count_dropped(data.gold)),
        num_workers=run.engine.world_size, steps=run.steps, evaluations=run.evaluations, chosen_step=run.chosen_step,
        gold_accuracy=run.best.accuracy if run.best is not None else None, gold_loss=run.best.loss if run.best is not None else None,
        num_sequence_tokens=stats.sequence_tokens, num_unique_tokens=stats.unique_tokens,
        padding_fraction=stats.padding_fraction, shared_fraction=stats.shared_fraction, seconds={**run.seconds, **seconds},
    )  # fmt: skip


def staging_folder(output_dir: str) -> Path:
    """Return the empty folder in which a model grows until it is whole; what a killed run left there goes.

    Raises:
        RunConflictError: `output_dir` is already there.
    """
    if Path(output_dir).exists():
        raise RunConflictError(f"{output_dir} exists already; models are never overwritten: name another folder, or remove it first")
    staging = Path(f"{output_dir}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, record: TrainingRecord, output_dir: str) -> None:
    """Write the record and make the folder appear under its name, all at once."""
    (staging / RECORD_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    staging.rename(output_dir)


def train_in_process(train: pa.Table, gold: pa.Table | None, config: TrainConfig, output_dir: str) -> TrainingRecord:
    """Train in this process, without Ray and DeepSpeed, on one device. Arguments and result as `ray_trainer.train_reward_model`."""
    start = time.perf_counter()
    staging = staging_folder(output_dir)
    tokenizer = load_tokenizer(resolve_model(config.backbone))
    data = prepare_data(tokenizer, train, gold, config)
    choose_pad_token(tokenizer)
    if not config.use_gpu:
        torch.set_num_threads(config.num_threads)
    module = build_module(config).to("cuda" if config.use_gpu else "cpu")
    loaded = time.perf_counter() - start
    save = saver(module, tokenizer, staging, config)
    run = TrainingRun(module, data, config, PlainEngine(module, config), save)
    run.run()
    record = make_record(run, {"load": loaded, "total": time.perf_counter() - start})
    publish(staging, record, output_dir)
    return record


def saver(module: RewardModule, tokenizer: Any, staging: Path, config: TrainConfig) -> Callable[[], None]:
    """Return what writes the current weights over those kept before: one set on disk, none in memory."""
    return lambda: save_reward_model(module.model, tokenizer, str(staging), dtype=config.save_dtype)


def _counts(stats: PackingStats) -> tuple[int, int, int, int]:
    return stats.sequence_tokens, stats.unique_tokens, stats.computed_tokens, stats.padded_tokens
