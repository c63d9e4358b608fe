"""Pairs of several scored replies of one prompt: which of them are made, in what order, and how a ceiling is kept.

Paper: App. C says nothing of it. Our choice, all of it, as `PairRule` states.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.ingest.fields import Value
from synpref_ray.schema import DropReason

MAX_PAIRS_PER_PROMPT = 6  # ours: every pair of four replies, as UltraFeedback has them; more of one prompt would outweigh other prompts


class Candidate(NamedTuple):
    """A pair as proposed: prompt, chosen and rejected as the structural filter reads them; `mark` tells pairs of one row apart."""

    prompt: Value
    chosen: Value
    rejected: Value
    mark: str = ""


class Refusal(NamedTuple):
    """A row, or the part of it in `item`, that gives no pair."""

    reason: DropReason
    item: Value = None


Proposal = Candidate | Refusal


class Better(StrEnum):
    """Which end of a scale is the good one."""

    HIGHER = "higher"
    LOWER = "lower"


class PairRule(Settings):
    """Which pairs several scored replies of one prompt make.

    Our choice: every two replies whose scores differ by at least `margin` and are not equal, the widest difference first, among equal differences the
    two replies that the pairs before use least, then by the places of the chosen and of the rejected reply; at most `max_pairs`. Two replies of one
    score make no pair; a prompt of which all replies tie is refused.
    """

    better: Better = Better.HIGHER
    """Which end of the scale is the good one."""
    margin: float = Field(default=0.0, ge=0.0)
    """Two scores make a pair if they differ by so much."""
    max_pairs: int = Field(default=MAX_PAIRS_PER_PROMPT, ge=1)
    """The most pairs of one prompt."""


_Wide = tuple[float, int, int, Value, Value]  # minus the difference, places and texts of the chosen and the rejected reply


def pair_up(prompt: Value, scored: Sequence[tuple[int, Value, float]], rule: PairRule) -> list[Proposal]:
    """Make pairs of scored replies (place, reply, score) by the rule that `PairRule` states; the list is never empty."""
    sign = 1.0 if rule.better is Better.HIGHER else -1.0
    wide: list[_Wide] = []
    for place, reply, score in scored:
        for other_place, other, other_score in scored:
            difference = sign * (score - other_score)
            if difference > 0 and difference >= rule.margin:
                wide.append((-difference, place, other_place, reply, other))
    if not wide:
        return [Refusal(DropReason.TIED if len(scored) > 1 else DropReason.NO_COMPARISON)]
    return [Candidate(prompt, chosen, rejected, f"{place}>{other}") for _, place, other, chosen, rejected in _spread(wide, rule.max_pairs)]


def _spread(wide: Sequence[_Wide], max_pairs: int) -> list[_Wide]:
    """Choose pairs in the order that `PairRule` states.

    Uses only grow, so that a heap entry whose uses have grown is put back and the first one that is up to date is the least.
    """
    if len(wide) <= max_pairs:  # all of them: the order alone is left to say
        return sorted(wide, key=lambda entry: entry[:3])
    heap = [(entry[0], 0, *entry[1:3], number) for number, entry in enumerate(wide)]
    heapq.heapify(heap)
    uses: Counter[int] = Counter()
    kept: list[_Wide] = []
    while heap and len(kept) < max_pairs:
        difference, before, place, other, number = heap[0]
        now = uses[place] + uses[other]
        if now > before:
            heapq.heapreplace(heap, (difference, now, place, other, number))
            continue
        heapq.heappop(heap)
        kept.append(wide[number])
        uses.update((place, other))
    return kept
