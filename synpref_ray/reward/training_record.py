"""What a training run leaves beside its weights: settings, versions, losses, gold metrics, and which step was kept.

Metrics are named as TRL's RewardTrainer names them (loss, accuracy, margin, mean_reward, min_reward, max_reward, num_tokens).
"""

from pydantic import BaseModel, ConfigDict

from synpref_ray.reward.packing import PackingStats
from synpref_ray.reward.training_config import TrainConfig


class Record(BaseModel):
    """Base of the records: frozen, infinities kept as such."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class StepRecord(Record):
    """One optimizer step over one global batch."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    margin: float
    mean_reward: float
    min_reward: float
    max_reward: float
    num_pairs: int
    num_tokens: int
    """Tokens of all sequences so far, each counted whole, as TRL counts them."""
    learning_rate: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    unique_tokens_per_second: float
    padding_fraction: float
    shared_fraction: float
    stall_fraction: float
    """Share of the step's seconds in which this run's first worker waited for data."""
    flops_per_second: float
    """Work of the model on unique tokens: 6 x (weights of linear layers) x tokens / seconds; attention is left out."""
    mfu: float | None
    """`flops_per_second` over what the workers' GPUs can do in bfloat16; None where that is not known."""


class EvaluationRecord(Record):
    """Gold at one step."""

    step: int
    accuracy: float
    loss: float
    margin: float
    num_pairs: int
    seconds: float


class Progress(Record):
    """A run at a checkpoint: all that is not in the tensors or in the log of steps. `step` is also the place in the data."""

    step: int
    evaluations: list[EvaluationRecord]
    best_step: int | None
    """The step whose weights are kept; None before the first evaluation."""
    seconds: dict[str, float]
    tokens: PackingStats
    num_resumes: int


class TrainingRecord(Record):
    """The whole run. `chosen_step` is the step whose weights the folder holds."""

    config: TrainConfig
    versions: dict[str, str]
    template_digest: str
    shares_prefixes: bool
    attention_ways: dict[str, str] = {}
    """What a GPU measured to be the fastest way to attend (`attention.AttentionChoice`), by how many keys a token sees at most and what for."""
    num_pairs: int
    num_dropped: dict[str, int]
    num_by_source: dict[str, int] | None = None
    """How many of the pairs given came from which source; None in older records."""
    num_shortened: int = 0
    """Pairs to train on that lost their oldest turns."""
    num_spelled: int = 0
    """Pairs to train on whose text spells special tokens, read as letters."""
    num_gold_pairs: int
    num_gold_dropped: dict[str, int]
    num_gold_shortened: int = 0
    num_workers: int
    num_resumes: int = 0
    """How often the run went on from a checkpoint, after a kill or with another number of workers."""
    steps: list[StepRecord]
    evaluations: list[EvaluationRecord]
    chosen_step: int
    gold_accuracy: float | None
    gold_loss: float | None
    stored_gold_accuracy: float | None = None
    """Gold measured once more at the end, with the weights as they are stored (`save_dtype`); None without gold, and in older records."""
    stored_gold_loss: float | None = None
    num_sequence_tokens: int
    num_unique_tokens: int
    padding_fraction: float
    shared_fraction: float
    seconds: dict[str, float]
    """Wall time by part: startup, load, train, evaluate, save, total."""
