"""Training a Bradley-Terry reward model: the core loop, which runs in one process without Ray (Paper: Sec. 3.2, Step 1; Sec. 4; App. E).

The loop reads planned micro-batches (`training_data`), knows an engine only by its protocol (`engine`), and can stop at any moment: a run
started again goes on from its last checkpoint (`checkpoints`), and its losses are those of a run that never stopped. The loss is divided by the
number of pairs of the global batch, so neither micro-batches nor ranks change the result.

Shape legend: P pairs, S sequences.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch

from synpref_ray.bundled import digest_model, pin_model, resolve_model
from synpref_ray.errors import InputError, NonFiniteLossError, RunConflictError
from synpref_ray.reward.batch_store import Microbatch
from synpref_ray.reward.checkpoints import TrainingFolder
from synpref_ray.reward.engine import WEIGHT, PlainEngine, TrainingEngine
from synpref_ray.reward.loss import bradley_terry_loss
from synpref_ray.reward.memory import explain_training
from synpref_ray.reward.metrics_log import MetricsLog
from synpref_ray.reward.model import RewardModule, load_backbone_with_head, load_tokenizer, read_row_layout, save_reward_model
from synpref_ray.reward.packing import PackingStats, batch_tokens, pack, to_device
from synpref_ray.reward.pair_groups import pair_places
from synpref_ray.reward.pair_metrics import (
    are_finite,
    describe_not_finite,
    model_flops_utilisation,
    pairs_not_finite,
    read_metrics,
    spoil_unless_finite,
    sum_over_ranks,
)
from synpref_ray.reward.render import choose_pad_token
from synpref_ray.reward.scorer import RECORD_FILE
from synpref_ray.reward.training_config import RESOURCE_SETTINGS
from synpref_ray.reward.training_config import TrainConfig as TrainConfig
from synpref_ray.reward.training_data import LoadedBatch, StepLoader, TrainingData, load_pieces, prepare_data
from synpref_ray.reward.training_plan import deal_to_ranks, evaluation_steps, learning_rate_factor
from synpref_ray.reward.training_record import EvaluationRecord, Progress, StepRecord, TrainingRecord
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import package_versions

logger = logging.getLogger(__name__)


class TrainingWatcher(Protocol):
    """Told what rank 0 has just done, to export it."""

    def step(self, record: StepRecord, tokens: PackingStats) -> None: ...

    def evaluation(self, record: EvaluationRecord) -> None: ...


@dataclass
class TrainingRun:
    """One run on one rank: what the loop reads, what it has measured, and where it keeps what a restart needs.

    `write_weights(folder, weights)` writes a model folder; called on rank 0 only. `report` gets the metrics at each evaluation, on every rank;
    `watch` hears of every step, on rank 0.
    """

    module: RewardModule
    data: TrainingData
    config: TrainConfig
    engine: TrainingEngine
    folder: TrainingFolder
    write_weights: Callable[[str, Mapping[str, torch.Tensor]], None]
    report: Callable[[dict[str, float]], None] = lambda metrics: None
    watch: TrainingWatcher | None = None

    def __post_init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationRecord] = []
        self.best: EvaluationRecord | None = None
        self.stored: EvaluationRecord | None = None
        self.stats = PackingStats(0, 0, 0, 0)
        self.seconds = dict.fromkeys(("train", "evaluate", "save", "stall"), 0.0)
        self._index = self.data.open()
        if self._index.num_pairs != self.config.num_epochs * self.data.train.pairs:
            raise InputError(f"the batches hold {self._index.num_pairs} pairs, not {self.config.num_epochs} times {self.data.train.pairs}")
        self._steps_per_epoch = self._index.num_steps // self.config.num_epochs
        self._token_flops, self._end_flops = self.module.linear_flops(1, 0), self.module.linear_flops(0, 1)
        self.num_resumes = 0
        self._sealed: int = 0
        self._sealed_best: int | None = None
        self._log: MetricsLog | None = None
        self._deal_gold()

    def run(self) -> None:
        """Train for the configured epochs, from the last checkpoint if there is one, and leave the kept weights in the folder.

        Raises:
            InputError: a loss is not finite; the weights and checkpoints that were kept last stay.
        """
        self._resume()
        config, num_steps, done = self.config, self._index.num_steps, len(self.steps)
        evaluate_after = evaluation_steps(
            self._steps_per_epoch, config.num_epochs, per_epoch=config.evaluations_per_epoch, every_steps=config.evaluate_every_steps
        )
        loader = StepLoader(
            self._index, self.data.storage, rank=self.engine.rank, world_size=self.engine.world_size, first_step=done + 1,
            prefetch_steps=config.prefetch_steps,
        )  # fmt: skip
        self._log = MetricsLog(self.folder, purge_after=done) if self.engine.rank == 0 else None
        self.module.train()
        stalled_before = 0.0
        for step, batches in enumerate(loader, start=done + 1):
            factor = learning_rate_factor(step, num_steps, schedule=config.schedule, warmup_fraction=config.warmup_fraction)
            with explain_training(config.max_tokens_per_microbatch):
                self._train_step(step, factor, batches, loader.stalled_seconds - stalled_before)
            stalled_before = loader.stalled_seconds
            if self.data.gold is not None and step in evaluate_after:
                self._evaluate_and_keep(step)
            if config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0 and step < num_steps:
                self._checkpoint(step)
        if self.best is None:
            self._keep_weights(num_steps)
        else:
            self.stored = self._measure_stored(self.best)
        if self._log is not None:
            self._log.close()

    @property
    def chosen_step(self) -> int:
        """The step whose weights are kept."""
        return self.best.step if self.best is not None else self._index.num_steps

    def _train_step(self, step: int, factor: float, batches: Sequence[LoadedBatch], stalled: float) -> None:
        start = time.perf_counter()
        numbers = self._index.batches_of(step)
        pairs, stats = int(self._index.column("pairs", numbers).sum()), self._index.stats(numbers)
        pieces: list[torch.Tensor] = []
        for number, batch in enumerate(batches, start=1):
            rewards = self._forward_pairs(batch.microbatch)
            loss = bradley_terry_loss(rewards[:, 0], rewards[:, 1]).sum() * batch.weight
            self.engine.backward(spoil_unless_finite(loss / pairs, rewards), last=number == len(batches))
            if batch.weight:
                pieces.append(rewards.detach())
        rewards = torch.cat(pieces) if pieces else torch.zeros(0, 2, device=self.engine.device)
        launched = [self.engine.step(factor).double().view(1), sum_over_ranks(rewards, self.engine)]
        norm, *values = torch.cat(launched).tolist()  # our one wait for the device in a step; no weight has changed if anything is not finite
        metrics = read_metrics(values)
        self._require_finite(step, metrics, rewards, batches)
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"the gradient's norm became {norm} in optimizer step {step}, while the loss and all rewards were finite; {self._kept()}; "
                "lower learning_rate"
            )
        seconds = time.perf_counter() - start + stalled
        self.stats += stats
        self.seconds["train"] += seconds
        self.seconds["stall"] += stalled
        flops = 3.0 * (self._token_flops * stats.unique_tokens + self._end_flops * 2 * pairs) / seconds  # backward: twice forward
        record = StepRecord(
            step=step, epoch=round(step / self._steps_per_epoch, 4), num_pairs=pairs, num_tokens=self.stats.sequence_tokens,
            learning_rate=self.config.learning_rate * factor, grad_norm=norm, seconds=seconds, **metrics,
            tokens_per_second=stats.sequence_tokens / seconds, unique_tokens_per_second=stats.unique_tokens / seconds,
            padding_fraction=stats.padding_fraction, shared_fraction=stats.shared_fraction, stall_fraction=stalled / seconds,
            flops_per_second=flops, mfu=model_flops_utilisation(flops, self.engine),
        )  # fmt: skip
        self.steps.append(record)
        self._add_metrics("train", step, record)
        if self.watch is not None and self.engine.rank == 0:
            self.watch.step(record, stats)
        logger.info("step %d: loss %.4f, accuracy %.3f, %.1f s", step, metrics["loss"], metrics["accuracy"], seconds)

    def _forward_pairs(self, batch: Microbatch) -> torch.Tensor:
        """Return the rewards of (chosen, rejected), shape (P, 2)."""
        device = self.engine.device
        rewards = self.engine.forward(pack([group.group for group in batch.groups]).to(device))
        chosen, rejected = (to_device(torch.from_numpy(places), device) for places in pair_places(batch.groups))
        return torch.stack([rewards[chosen], rewards[rejected]], dim=1)

    def _add_metrics(self, kind: str, step: int, record: StepRecord | EvaluationRecord) -> None:
        if self._log is not None:
            values = record.model_dump(exclude={"step"})
            self._log.add(step, {f"{kind}/{name}": value for name, value in values.items() if value is not None})

    def _require_finite(self, step: int, metrics: Mapping[str, float], rewards: torch.Tensor, batches: Sequence[LoadedBatch]) -> None:
        """Stop if a loss or a reward is not finite, on all ranks and with the same message: they tell each other their pairs."""
        if are_finite(metrics):
            return
        ids = [name for batch in batches if batch.weight for name in batch.microbatch.pair_ids]
        found = [name for rank in self.engine.gather(pairs_not_finite(rewards, ids)) for name in rank]
        raise NonFiniteLossError(f"{describe_not_finite(step, metrics, found)}; {self._kept()}; lower learning_rate, or look at these pairs")

    def _kept(self) -> str:
        weights = f"the weights of step {self.best.step} are the last good ones" if self.best is not None else "no weights were kept yet"
        return f"{weights}, {f'the last checkpoint is of step {self._sealed}' if self._sealed else 'and there is no checkpoint'}"

    # Gold

    def _deal_gold(self) -> None:
        self._gold: list[LoadedBatch] = []
        if self.data.gold is not None:
            tokens = [batch_tokens(group.group for group in batch.groups) for batch in self.data.gold]
            ranks = deal_to_ranks([len(batch.groups) for batch in self.data.gold], tokens, self.engine.world_size)
            self._gold = load_pieces(ranks[self.engine.rank], self.data.gold)

    def _measure_gold(self, step: int) -> EvaluationRecord:
        start = time.perf_counter()
        self.module.eval()
        with torch.no_grad():
            pieces = [(self._forward_pairs(batch.microbatch), batch.weight) for batch in self._gold]
        self.module.train()
        rewards = [rewards for rewards, weight in pieces if weight]
        mine = torch.cat(rewards) if rewards else torch.zeros(0, 2, device=self.engine.device)
        metrics = read_metrics(sum_over_ranks(mine, self.engine).tolist())
        seconds = time.perf_counter() - start
        self.seconds["evaluate"] += seconds
        self._require_finite(step, metrics, mine, self._gold)
        values = {name: metrics[name] for name in ("accuracy", "loss", "margin")}
        return EvaluationRecord(step=step, num_pairs=self.data.chosen_by.pairs, seconds=seconds, **values)

    def _measure_stored(self, best: EvaluationRecord) -> EvaluationRecord:
        """Measure gold with the kept weights as they are stored, on the backbone that was trained: no second model need fit in memory.

        Our choice: gold picks the checkpoint by the float32 weights of the moment, as training has them; this tells what rounding did to it.
        """
        if self.config.save_dtype == "float32":
            return best
        self._wait_for_all_ranks()  # the first one has written them
        for name, weight in self.folder.stored_weights(best.step):
            self.engine.set_weight(name, weight)
        found = self._measure_gold(best.step)
        logger.info("as stored (%s): gold accuracy %.4f, gold loss %.4f", self.config.save_dtype, found.accuracy, found.loss)
        return found

    def _evaluate_and_keep(self, step: int) -> None:
        found = self._measure_gold(step)
        self.evaluations.append(found)
        logger.info("step %d: gold accuracy %.4f, gold loss %.4f", step, found.accuracy, found.loss)
        self._add_metrics("gold", step, found)
        if self.watch is not None and self.engine.rank == 0:
            self.watch.evaluation(found)
        if self._log is not None:
            self._log.flush()
        self.report({"step": step, "train/loss": self.steps[-1].loss, "gold/accuracy": found.accuracy, "gold/loss": found.loss})
        if is_better(found, self.best):
            self.best = found
            self._keep_weights(step)

    # What a restart needs

    def _keep_weights(self, step: int) -> None:
        start = time.perf_counter()
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.model.named_parameters():
            # Under ZeRO-3 no rank holds a parameter whole: they all gather it, and the first one keeps it.
            keeps = self.engine.rank == 0
            found = self.engine.parameter_state(name, [WEIGHT], wanted=keeps) if self.config.zero_stage == 3 else {WEIGHT: parameter.detach()}
            if keeps:
                weights[name] = found[WEIGHT]
        if self.engine.rank == 0:
            keep = set() if self._sealed_best is None else {self._sealed_best}
            self.folder.save_weights(step, lambda folder: self.write_weights(folder, weights), keep)
        self.seconds["save"] += time.perf_counter() - start

    def _checkpoint(self, step: int) -> None:
        start = time.perf_counter()
        self.folder.write_state(step, self.engine)
        self._wait_for_all_ranks()  # every one has written its share
        self._sealed_best = self.best.step if self.best is not None else None
        if self.engine.rank == 0:
            progress = Progress(
                step=step, evaluations=self.evaluations, best_step=self._sealed_best, seconds=self.seconds, tokens=self.stats,
                num_resumes=self.num_resumes,
            )  # fmt: skip
            self.folder.seal(progress, self.steps[self._sealed :], self.config.checkpoints_kept)
        self._sealed = step
        if self._log is not None:
            self._log.flush()
        self.seconds["save"] += time.perf_counter() - start

    def _wait_for_all_ranks(self) -> None:
        self.engine.total(torch.zeros(1, device=self.engine.device)).tolist()

    def _resume(self) -> None:
        found = self.folder.sealed_steps() if self.engine.rank == 0 else []  # the first rank decides: listings of other nodes may be older
        last = torch.tensor([float(found[-1] if found else 0)], device=self.engine.device)
        step = int(self.engine.maximum(last).item())
        if self.engine.rank == 0:
            self.folder.discard_after(step)
        if step == 0:
            return
        progress = self.folder.progress_at(step)
        self.folder.restore(progress, self.engine)
        self.steps, self.evaluations, self._sealed = self.folder.step_records(step), list(progress.evaluations), step
        self.best = next((found for found in self.evaluations if found.step == progress.best_step), None)
        self._sealed_best = progress.best_step
        self.stats, self.seconds, self.num_resumes = progress.tokens, dict(progress.seconds), progress.num_resumes + 1
        logger.info("going on after optimizer step %d of %d", progress.step, self._index.num_steps)


def is_better(found: EvaluationRecord, best: EvaluationRecord | None) -> bool:
    """Paper: Sec. 3.2, Step 1: the highest gold accuracy. Our choice: ties go to the lower gold loss, then to the earlier step."""
    return best is None or (found.accuracy, -found.loss) > (best.accuracy, -best.loss)


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
    module = RewardModule(model, torch.bfloat16 if config.precision == "bfloat16" else None, attention=config.attention)
    if config.gradient_checkpointing:
        module.checkpoint_gradients(config.gradient_checkpointing_min_tokens)
    if config.compile_layers:
        module.compile_layers()
    return module


def make_record(run: TrainingRun, seconds: dict[str, float]) -> TrainingRecord:
    """Put together what the run leaves beside its weights."""
    data, stats = run.data, run.stats
    return TrainingRecord(
        config=run.config, versions=package_versions(), template_digest=data.template_digest, shares_prefixes=run.module.may_share,
        attention_ways=run.module.attention_ways,
        num_pairs=data.train.pairs, num_dropped=data.train.dropped, num_shortened=data.train.shortened, num_spelled=data.train.spelled,
        num_gold_pairs=data.chosen_by.pairs, num_gold_dropped=data.chosen_by.dropped, num_gold_shortened=data.chosen_by.shortened,
        num_workers=run.engine.world_size, num_resumes=run.num_resumes, steps=run.steps, evaluations=run.evaluations, chosen_step=run.chosen_step,
        gold_accuracy=run.best.accuracy if run.best is not None else None, gold_loss=run.best.loss if run.best is not None else None,
        stored_gold_accuracy=run.stored.accuracy if run.stored is not None else None,
        stored_gold_loss=run.stored.loss if run.stored is not None else None,
        num_sequence_tokens=stats.sequence_tokens, num_unique_tokens=stats.unique_tokens,
        padding_fraction=stats.padding_fraction, shared_fraction=stats.shared_fraction, seconds={**run.seconds, **seconds},
    )  # fmt: skip


def weights_writer(module: RewardModule, tokenizer: Any, config: TrainConfig) -> Callable[[str, Mapping[str, torch.Tensor]], None]:
    """Return what writes a model folder that plain transformers loads."""
    return lambda folder, weights: save_reward_model(module.model, tokenizer, folder, dtype=config.save_dtype, weights=weights)


def make_model(folder: TrainingFolder, record: TrainingRecord, output_dir: str) -> None:
    """Put the kept weights and the record into a new local folder, all at once."""
    growing = f"{output_dir}.partial"
    shutil.rmtree(growing, ignore_errors=True)
    folder.take_weights(record.chosen_step, growing)
    folder.take_metrics(growing)
    (Path(growing) / RECORD_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    Path(growing).rename(output_dir)


def claim_folder(train: pa.Table, gold: pa.Table | None, config: TrainConfig, output_dir: str) -> TrainingFolder:
    """Return `<output_dir>.training`, with what an interrupted run on the same data with the same settings left there.

    Raises:
        RunConflictError: `output_dir` is already there.
    """
    if Path(output_dir).exists():
        raise RunConflictError(f"{output_dir} exists already; models are never overwritten: name another folder, or remove it first")
    path = Path(output_dir).absolute()
    folder = TrainingFolder(Storage(str(path.parent)), f"{path.name}.training")
    pairs = [[table[name].to_pylist() for name in ("pair_id", "chosen")] if table is not None else [] for table in (train, gold)]
    settings = config.model_dump(mode="json", exclude=RESOURCE_SETTINGS)
    folder.claim(content_digest([settings, digest_model(config.backbone), pairs]))
    return folder


def train_in_process(train: pa.Table, gold: pa.Table | None, config: TrainConfig, output_dir: str) -> TrainingRecord:
    """Train in this process, without Ray and DeepSpeed, on one device, and write the model to `output_dir`, all at once.

    A run that was killed goes on from `<output_dir>.training` when it is started again with the same data and settings.

    Args:
        train: pairs with pair_id, prompt, chosen, rejected; chosen is the preferred reply (flips already applied).
        gold: pairs that choose the checkpoint, never trained on; None keeps the last step.

    Raises:
        RunConflictError: `output_dir` is already there.
        InputError: nothing to train on, or a loss that is not finite.
    """
    return train_tables(train, gold, config, output_dir, run_in_process)


def train_tables(
    train: pa.Table,
    gold: pa.Table | None,
    config: TrainConfig,
    output_dir: str,
    run: Callable[[TrainingData, TrainConfig, TrainingFolder], TrainingRecord],
) -> TrainingRecord:
    """Prepare two tables, train on them with `run`, and write the model; arguments and errors as `train_in_process`."""
    start = time.perf_counter()
    config = config.model_copy(update={"backbone": pin_model(config.backbone)})
    folder = claim_folder(train, gold, config, output_dir)
    backbone = resolve_model(config.backbone)
    layout = read_row_layout(backbone, config.max_tokens_per_microbatch)
    data = prepare_data(load_tokenizer(backbone), train, gold, config, layout, folder.storage, f"{folder.path}/batches")
    record = run(data, config, folder)
    record = record.model_copy(update={"seconds": {**record.seconds, "total": time.perf_counter() - start}})
    make_model(folder, record, output_dir)
    folder.remove()
    return record


def run_in_process(data: TrainingData, config: TrainConfig, folder: TrainingFolder) -> TrainingRecord:
    """Train on prepared data in this process and leave the kept weights in `folder`."""
    start = time.perf_counter()
    if not config.use_gpu:
        torch.set_num_threads(config.num_threads)
    tokenizer = load_tokenizer(resolve_model(config.backbone))
    choose_pad_token(tokenizer)
    module = build_module(config).to("cuda" if config.use_gpu else "cpu")
    loaded = time.perf_counter() - start
    run = TrainingRun(module, data, config, PlainEngine(module, config), folder, weights_writer(module, tokenizer, config))
    run.run()
    return make_record(run, {"load": loaded})
