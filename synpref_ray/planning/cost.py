"""The cost of a curation run, line by line.

Paper: App. F: B ≈ c_H · |gold| + c_L1 · |silver| + c_L2 · |Stage 2|. Our choice: the GPU hours of tagging, of two reward model passes, of judging
mismatches and of training are lines of their own, since the paper's sum leaves them out and at tens of millions of pairs they are not small. Every
line is linear in the sizes, so a budget is split by plain division.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError

SizeName = Literal["gold", "silver", "stage2"]
SIZE_NAMES: tuple[SizeName, ...] = ("gold", "silver", "stage2")


class Prices(Settings):
    """What one unit costs, all in one currency."""

    gold_pair: NonNegativeFloat = 0.50  # App. F, worked example: c_H; Sec. 3.2 pays 0.10 to 0.70
    silver_pair: NonNegativeFloat = 0.05  # App. F, worked example: c_L1
    stage2_pair: NonNegativeFloat = 0.01  # App. F, worked example: c_L2; 0 where the judges run on GPUs of one's own
    gpu_hour: NonNegativeFloat = 0.0  # ours: App. F counts no GPU; above 0 the throughputs must be known


class Throughputs(Settings):
    """Pairs per GPU hour, as measured; 0: not known."""

    tag: NonNegativeFloat = 0.0
    """Of tagging."""
    score: NonNegativeFloat = 0.0
    """Of one pass of one reward model."""
    judge: NonNegativeFloat = 0.0
    """Of judging."""
    train: NonNegativeFloat = 0.0
    """Of training."""


class Sizes(Settings):
    """How many pairs people label, judges label in Stage 1, and Stage 2 goes through."""

    gold: NonNegativeInt = 0
    """Pairs that people label."""
    silver: NonNegativeInt = 0
    """Pairs that judges label in Stage 1."""
    stage2: NonNegativeInt = 0
    """Pairs that Stage 2 goes through."""

    def as_mapping(self) -> Mapping[SizeName, int]:
        """Return the sizes by name."""
        return {"gold": self.gold, "silver": self.silver, "stage2": self.stage2}


class Assumptions(Settings):
    """How the work follows from the sizes."""

    mismatch_fraction: float = Field(default=0.35, ge=0.0, le=1.0)  # ours: the paper does not say; the 14M of 40M that it discards
    curated_fraction: float = Field(default=0.65, ge=0.0, le=1.0)  # Sec. 3.3: 26M of 40M are kept
    """Of Stage 2's pairs, those that are kept as they are: what final models are trained on."""
    flipped_fraction: float = Field(default=1.0, ge=0.0, le=1.0)  # Sec. 4: the 40M set holds all 14M others, flipped
    """Of the pairs that are not kept, those that are flipped: a scaling curve counts kept and flipped ones."""
    tag_scope: Literal["mismatches", "all"] = "mismatches"  # Sec. 3.3
    rounds: PositiveInt = 8  # Sec. 3.2
    num_epochs: PositiveInt = 1  # App. E
    num_models: PositiveInt = 1  # ours: one final model; the paper's family has eight

    @property
    def on_curve(self) -> float:
        """Of Stage 2's pairs, those that a scaling curve counts: kept and flipped."""
        return self.curated_fraction + self.flipped_fraction * (1 - self.curated_fraction)


@dataclass(frozen=True)
class CostLine:
    """One line of a cost: so many units at such a price."""

    name: str
    quantity: float
    unit: str
    price: float

    @property
    def cost(self) -> float:
        """Quantity times price."""
        return self.quantity * self.price


@dataclass(frozen=True)
class Cost:
    """A run's cost."""

    lines: tuple[CostLine, ...]

    @property
    def total(self) -> float:
        """The sum of the lines."""
        return sum(line.cost for line in self.lines)

    @property
    def gpu_hours(self) -> float:
        """GPU hours of all lines."""
        return sum(line.quantity for line in self.lines if line.unit == GPU_HOURS)


GPU_HOURS = "GPU hours"
PAIRS = "pairs"


@dataclass(frozen=True)
class CostModel:
    """Prices, throughputs and assumptions together: what turns sizes into a cost."""

    prices: Prices
    throughputs: Throughputs
    assumptions: Assumptions

    def cost(self, sizes: Mapping[SizeName, float]) -> Cost:
        """Return the cost of these sizes (they need not be whole).

        Raises:
            ConfigError: GPU hours have a price, and the throughput of a step is not known.
        """
        gold, silver, stage2 = (sizes.get(name, 0.0) for name in SIZE_NAMES)
        prices = self.prices
        lines = [
            CostLine("gold: people", gold, PAIRS, prices.gold_pair),
            CostLine("silver: judges", silver, PAIRS, prices.silver_pair),
            CostLine("Stage 2: judges", stage2, PAIRS, prices.stage2_pair),
        ]
        if prices.gpu_hour:
            lines += [CostLine(f"GPU: {name}", self._hours(name, pairs), GPU_HOURS, prices.gpu_hour) for name, pairs in self.gpu_work(sizes).items()]
        return Cost(tuple(lines))

    def gpu_work(self, sizes: Mapping[SizeName, float]) -> dict[str, float]:
        """Return by step the pairs that GPUs go through (one reward model pass, or one epoch, is once).

        Our choice: silver grows evenly over the seed and the rounds; each round, and the last training after them, trains on all of it so far:
        (rounds + 2) / 2 times silver in sum.
        """
        gold, silver, stage2 = (sizes.get(name, 0.0) for name in SIZE_NAMES)
        about = self.assumptions
        mismatches = about.mismatch_fraction * stage2
        final = about.curated_fraction * stage2 * about.num_epochs * about.num_models
        return {
            "tag": gold + silver + (stage2 if about.tag_scope == "all" else mismatches),
            "score": 2 * stage2,
            "judge": mismatches,
            "train": silver * (about.rounds + 2) / 2 + gold + final,
        }

    def marginal(self, name: SizeName) -> float:
        """Return what one more pair of a kind costs, all lines together."""
        return self.cost({name: 1.0}).total

    def _hours(self, name: str, pairs: float) -> float:
        rate: float = getattr(self.throughputs, name)
        if not rate and pairs:
            raise ConfigError(f"GPU hours cost {self.prices.gpu_hour:g} each, but throughputs.{name} (pairs per GPU hour) is not given")
        return pairs / rate if pairs else 0.0
