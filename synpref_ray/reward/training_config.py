"""The settings of one reward-model training run, with the paper's final values as defaults where it gives them."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from synpref_ray.config import Settings
from synpref_ray.reward.attention import FLEX, VARLEN, AttentionWay
from synpref_ray.reward.model import HEAD_INIT_STD
from synpref_ray.reward.render import OverLong

# What a config says about the machine and not about the result: how the global batch is spread and what is recomputed changes it by float error only.
RESOURCE_SETTINGS = {
    "num_threads", "use_gpu", "num_workers", "max_tokens_per_microbatch", "gradient_checkpointing", "gradient_checkpointing_min_tokens",
    "zero_stage", "attention", "compile_layers", "prefetch_steps", "checkpoint_every_steps", "checkpoints_kept", "max_failures",
}  # fmt: skip


class TrainConfig(Settings):
    """How to train one reward model."""

    backbone: str
    """The pretrained model: a folder, a bundled model or a name on the hub; or a reward model to go on from."""
    new_head: bool | Literal["if_absent"] = "if_absent"
    """Initialise the reward head anew: only where the backbone has none (a reward model keeps its own), always (true), or never (false: fails if it
    has none). Either way the log says it."""
    head_init_std: PositiveFloat = HEAD_INIT_STD  # ours, see model.py
    learning_rate: PositiveFloat = 3e-6  # App. E, final runs
    head_learning_rate_multiplier: PositiveFloat = 1.0
    """Ours: the paper has one rate; a new head on a small model learns with 20."""
    num_epochs: PositiveInt = 1  # App. E
    global_batch_pairs: PositiveInt = 10_240  # App. E, final runs
    max_tokens_per_microbatch: PositiveInt = 16_384
    """Tokens of a micro-batch, padding included. Ours: one longest conversation; about 2,048 on a CPU."""
    max_length_tokens: PositiveInt = 16_384  # App. E
    """Pairs with a longer conversation are left out and counted, or shortened by whole turns; no message is cut."""
    over_long: OverLong = "reject"
    """What becomes of those: `reject`, or `drop_oldest_turns` of both sides until the longer one fits. Ours: the paper does not say."""
    schedule: Literal["constant", "linear"] = "constant"  # App. E, final runs
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the steps in which the learning rate rises. Ours: the paper does not state it for the final runs."""
    weight_decay: NonNegativeFloat = 0.0  # ours: not stated; never on norms, biases and the head
    max_grad_norm: PositiveFloat = 1.0  # ours: not stated
    seed: NonNegativeInt = 0
    """Seed of the order of pairs and of the reward head."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What the backbone computes in. Weights, optimizer, head and loss are float32 in both: bfloat16 means autocast, and a bfloat16 residual
    stream, as the stored model has."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the backbone is stored in; the head is always stored in float32. Under bfloat16 autocast its linear layers lose nothing."""
    evaluations_per_epoch: NonNegativeInt = 4
    """How often gold picks the checkpoint; 0 where `evaluate_every_steps` says it. Paper: Sec. 3.2 chooses by gold accuracy; ours: how often."""
    evaluate_every_steps: NonNegativeInt = 0
    """The same in optimizer steps, for epochs of thousands of them; 0 where `evaluations_per_epoch` says it. The last step is always evaluated."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, to save memory."""
    gradient_checkpointing_min_tokens: NonNegativeInt = 0
    """Smaller micro-batches (tokens, padding included) keep their activations. Ours: recomputing them costs a third and saves nothing."""
    attention: AttentionWay = "auto"
    """How to attend; auto: blocks on a CPU, the fastest one on a GPU, measured there (`attention`)."""
    compile_layers: bool = False
    """Run norms and MLPs through torch.compile, after the seconds that it takes; its gain is not measured yet; not with ZeRO-3. Ours."""
    num_layers: PositiveInt | None = None
    """Keep only the backbone's first layers: a smaller reward model for a CPU. Ours; the paper keeps all."""
    zero_stage: Literal[0, 1, 2, 3] = 1  # App. E
    num_workers: PositiveInt = 1
    """Processes that train together."""
    num_threads: PositiveInt = 2
    """CPU threads of each worker."""
    use_gpu: bool = False
    """Whether each worker has a GPU."""
    shuffle_window_pairs: PositiveInt = 131_072
    """Pairs that are shuffled together. Ours: a dozen of the paper's global batches, about 1 GB of token ids; less data is shuffled as a whole."""
    prefetch_steps: PositiveInt = 8
    """Optimizer steps whose micro-batches a worker fetches ahead. Ours."""
    checkpoint_every_steps: NonNegativeInt = 50
    """Optimizer steps between checkpoints to go on from after a kill; 0: none. Ours: about 20 minutes of the paper's final run."""
    checkpoints_kept: PositiveInt = 2
    """Ours: the last one, and the one before for a person to look at; a run goes on from the last."""
    max_failures: NonNegativeInt = 3
    """How often lost workers are replaced before the run fails. Ours."""

    @model_validator(mode="after")
    def _check_evaluations(self) -> Self:
        if bool(self.evaluations_per_epoch) == bool(self.evaluate_every_steps):
            raise ValueError("one of evaluations_per_epoch and evaluate_every_steps must be above 0, and the other one 0")
        return self

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        if self.attention in (VARLEN, FLEX) and not self.use_gpu:
            raise ValueError(f"attention={self.attention} trains on GPUs only: set use_gpu to true, or attention to auto or blocks")
        return self

    @model_validator(mode="after")
    def _check_zero_3(self) -> Self:
        if self.zero_stage == 3 and self.gradient_checkpointing and self.gradient_checkpointing_min_tokens:
            raise ValueError("with zero_stage 3 all workers must recompute alike: gradient_checkpointing_min_tokens must be 0")
        if self.zero_stage == 3 and self.compile_layers:
            raise ValueError("compile_layers does not work with zero_stage 3, whose hooks gather parameters: set compile_layers to false")
        return self
