"""When Stage 1 ends. The paper ran eight rounds and gives no other rule; a small pool may run dry, and a budget may ask for less."""

from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from synpref_ray.config import Settings


class StopReason(StrEnum):
    """Why no further round is run."""

    MAX_ROUNDS = "max_rounds"
    NO_NEW_PAIRS = "no_new_pairs"
    PLATEAU = "plateau"


class StopConfig(Settings):
    """When to stop. `plateau_rounds` 0 switches the plateau rule off."""

    max_rounds: int = Field(default=8, ge=1)  # Paper: Sec. 3.2, eight iterations
    plateau_rounds: int = Field(default=0, ge=0)  # ours: off, as the paper's internal validation set never gated a round
    min_gain: float = Field(default=0.0, ge=0.0)  # ours: any gain counts as one


def stop_reason(gold_accuracies: Sequence[float], *, num_new_pairs: int, config: StopConfig) -> StopReason | None:
    """Return why to stop after the rounds so far, or None to go on.

    Our choice: a plateau is `plateau_rounds` rounds in a row whose best accuracy exceeds the best before them by no more than `min_gain`;
    so one bad round between two good ones stops nothing. Our choice: accuracies are on the working gold of round 0, the same pairs for all
    rounds, because gold that joins later is of pairs that an RM found hard, and would look like a loss.

    Args:
        gold_accuracies: one per finished round, in order, all on the working gold of round 0 (audit gold steers nothing).
        num_new_pairs: what the last round's retrieval brought.
    """
    if len(gold_accuracies) >= config.max_rounds:
        return StopReason.MAX_ROUNDS
    if gold_accuracies and num_new_pairs == 0:
        return StopReason.NO_NEW_PAIRS
    if config.plateau_rounds and len(gold_accuracies) > config.plateau_rounds:
        before, recent = gold_accuracies[: -config.plateau_rounds], gold_accuracies[-config.plateau_rounds :]
        if max(recent) - max(before) <= config.min_gain:
            return StopReason.PLATEAU
    return None
