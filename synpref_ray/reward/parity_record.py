"""What the parity gate is told and what it finds: its settings, and the record that it leaves beside the weights as `parity_record.json`."""

from enum import StrEnum
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from synpref_ray.config import Settings
from synpref_ray.reward.attention import AttentionWay
from synpref_ray.reward.training_record import Record

PARITY_FILE = "parity_record.json"
PARITY_VERSION = 3  # 2: the engine attends over flat rows; 3: outside float32, differences count against the spread of the rewards alone
RESOURCE_SETTINGS = frozenset({"num_threads", "max_tokens_per_batch", "kv_cache_bytes", "gpu_memory_share", "vllm_timeout_seconds"})


class ParityConfig(Settings):
    """Whether and how a trained model's rewards are compared between engines; for a step that only uses models: what they must have passed."""

    enabled: bool = True
    """False: nothing is compared, and curation asks for no record."""
    vllm: bool = True
    """Compare vLLM as well. Ours: off in the configs for a laptop, where each model costs an engine's start (11 to 25 s on two cores), and always in
    Stage 1's rounds, whose models score gold and nothing else; the record says which sides were run."""
    num_pairs: PositiveInt = 8
    """Pairs drawn from those that the model trained on; a few fixed ones are added. Ours: about 26 conversations, a few seconds on a laptop."""
    seed: NonNegativeInt = 0
    """Seed of the sample."""
    float32_tolerance: PositiveFloat = 1e-4
    """Largest |difference| / max(1, |reward|) in float32. Ours: 48 sequences of a 135M model stayed within 1.6e-5."""
    checkpoint_tolerance: PositiveFloat = 0.2
    """Largest |difference| / spread of the sample's rewards in the checkpoint's dtype where that is not float32, against the same float32 rewards.
    Ours: see `reward/parity.py`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all sides run; cuda takes one GPU of the cluster for the time of the check."""
    attention: AttentionWay = "auto"
    """How our engine attends (`attention`): as it will when it scores."""
    compile_layers: bool = False
    """Whether our engine runs compiled norms and MLPs, as it does when it scores with `compile_layers`; the stages set it by their scorer's."""
    num_threads: PositiveInt = 2
    """Threads on a CPU."""
    max_tokens_per_batch: PositiveInt = 2048
    """Tokens of our engine's micro-batches, padding included."""
    kv_cache_bytes: PositiveInt = 1 << 29  # ours, vLLM on a CPU only
    gpu_memory_share: PositiveFloat = 0.8  # ours, vLLM on a GPU only
    vllm_timeout_seconds: PositiveFloat = 900.0  # ours: a start takes half a minute on a laptop, a few on a GPU node with a cold cache


DEFAULT_PARITY = ParityConfig()
MIN_SPREAD = 1e-3  # ours: float32 rewards that differ by less than this say nothing


class SideStatus(StrEnum):
    """What became of one side."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


class SideRecord(Record):
    """One engine in one dtype, against the reference. The numbers of a side that was not run are zero and mean nothing."""

    side: Literal["engine", "vllm"]
    dtype: str
    status: SideStatus
    tolerance: float
    scale: Literal["reward", "spread"]
    """What a difference counts relative to: max(1, |reward|) in float32, `ParityRecord.reward_spread` elsewhere."""
    max_difference: float = 0.0
    """Largest |difference| of two rewards; infinite if a reward is not finite."""
    max_scaled_difference: float = 0.0
    """Largest |difference| / scale: what `tolerance` bounds."""
    num_beyond_tolerance: int = 0
    num_orders_compared: int = 0
    """Pairs whose margin in the reference exceeds the tolerance, on the same scale."""
    num_orders_changed: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The side in words."""
        return f"{'our engine' if self.side == 'engine' else 'vLLM'} in {self.dtype}"


class ParityRecord(Record):
    """The whole check of one model, by content digest. The reference is plain transformers in float32, one conversation at a time."""

    version: int
    model_digest: str
    config: ParityConfig
    versions: dict[str, str]
    checkpoint_dtype: str
    num_conversations: int
    num_dropped: dict[str, int]
    """Pairs of the sample that this model cannot read, by reason (too long, or refused by its chat template)."""
    min_tokens: int
    max_tokens: int
    min_reward: float
    max_reward: float
    reward_spread: float
    """Standard deviation of the sample's rewards, MIN_SPREAD at least."""
    num_plain_template_differences: int
    """Conversations that plain `apply_chat_template` turns into other token ids than we do: a template that prints the date, a doubled BOS.
    Not an error, but who calls the model without this package must know."""
    sides: list[SideRecord]
    reference_seconds: float

    @property
    def passed(self) -> bool:
        """Whether no side failed; sides that were not run do not count."""
        return all(side.status is not SideStatus.FAILED for side in self.sides)

    def failures(self) -> str:
        """Return in words what failed."""
        return "; ".join(self._failure(side) for side in self.sides if side.status is SideStatus.FAILED)

    def _failure(self, side: SideRecord) -> str:
        allowed = f"{side.tolerance:g} * " + ("max(1, |r|)" if side.scale == "reward" else f"{self.reward_spread:.3g} (the rewards' spread)")
        rewards = (
            f"{side.num_beyond_tolerance} of {self.num_conversations} rewards are off by more than {allowed}, the worst by {side.max_difference:.3g}"
        )
        return f"{side.name}: {rewards}; {side.num_orders_changed} of {side.num_orders_compared} clear orders changed"
