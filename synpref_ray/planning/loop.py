"""The steps of the whole loop (ingest, Stage 1's rounds, Stage 2, models, evaluation) with their work, from the sizes of its pools.

How many pairs a round retrieves, how many become silver, and how many mismatches there are is known only afterwards, so those shares are taken
from a run that was measured. Our choice throughout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.planning.timing import PARITY, PlannedStep


@dataclass(frozen=True)
class LoopSizes:
    """What is known of a run before it begins."""

    seed: int
    unverified: int
    wild: int
    held_out: int
    seed_gold: int
    round_gold: int
    rounds: int
    taggers: tuple[str, ...]
    judges: tuple[str, ...]
    gold_epochs: int = 1
    silver_epochs: int = 1
    final_epochs: int = 1
    final_seeds: int = 1
    """Seeds of the last comparison: each trains one model on curated pairs and one on raw pairs."""


@dataclass(frozen=True)
class LoopShares:
    """What a measured run made of its pairs."""

    selected: tuple[float, ...]
    """Of the unverified pool, by round."""
    silver: float
    """Silver pairs of the pairs that Stage 1 looked at and that are no gold."""
    working_gold: float
    """Of all gold."""
    mismatches: float
    """Of the wild pool."""
    curated: float
    """Kept and flipped pairs of the wild pool."""


def read_shares(metrics: Mapping[str, Any], *, seed: int, unverified: int) -> LoopShares:
    """Return the shares from the metrics of a finished demo, or of Stage 1 and Stage 2 together.

    Args:
        seed, unverified: the sizes of that run's pools.

    Raises:
        InputError: a stage is not in them.
    """
    if "rounds" not in metrics or "stage2" not in metrics:
        raise InputError("the measured runs must hold a finished Stage 1 and a finished Stage 2: their shares decide how much work there is")
    rounds, stage2 = metrics["rounds"], metrics["stage2"]
    last = rounds[-1]["set_sizes"]
    gold = last["gold-working"] + last["gold-audit"]
    selected = [entry["selected_pairs"] for entry in rounds[1:]]
    looked_at = seed + sum(selected) - gold
    curated = stage2["decisions"].get("keep", 0) + stage2["decisions"].get("flip", 0)
    return LoopShares(
        selected=tuple(count / unverified if unverified else 0.0 for count in selected),
        silver=last["silver"] / looked_at if looked_at else 0.0,
        working_gold=last["gold-working"] / gold if gold else 0.0,
        mismatches=stage2["judged_pairs"] / stage2["pairs"] if stage2["pairs"] else 0.0,
        curated=curated / stage2["pairs"] if stage2["pairs"] else 0.0,
    )


def loop_steps(sizes: LoopSizes, shares: LoopShares) -> list[PlannedStep]:
    """Return the steps whose time counts, in order; rules over stored tables take none to speak of."""
    steps = [PlannedStep("ingest", sizes.seed + sizes.unverified + sizes.wild, "ingest")]
    steps += _labelling(sizes.taggers, sizes.judges, sizes.seed + sizes.unverified, 0, "Stage 1")
    gold, looked_at, left = sizes.seed_gold, float(sizes.seed), float(sizes.unverified)
    steps += [PlannedStep(f"judge ({judge})", sizes.seed, f"judge ({judge}), seed") for judge in sizes.judges]
    for number in range(1, sizes.rounds + 1):
        silver = shares.silver * (looked_at - gold)
        steps += _training(f"best RM, round {number}", silver * sizes.silver_epochs)
        steps.append(PlannedStep("score", gold, f"score gold, round {number}"))
        selected = min(left, _selected(shares.selected, number) * sizes.unverified)
        left -= selected
        looked_at += selected
        new_gold = min(sizes.round_gold, int(selected))
        gold += new_gold
        steps += [PlannedStep(f"judge ({judge})", gold + selected - new_gold, f"judge ({judge}), round {number}") for judge in sizes.judges]
    steps += _training("best RM, final", shares.silver * (looked_at - gold) * sizes.silver_epochs)
    steps += _training("gold RM", shares.working_gold * gold * sizes.gold_epochs)
    steps += [PlannedStep("score", 2 * gold, "score gold, final"), PlannedStep("score", 2 * sizes.wild, "score, both RMs")]
    mismatches = shares.mismatches * sizes.wild
    steps += _labelling(sizes.taggers, sizes.judges, mismatches, mismatches, "mismatches")
    for seed in range(sizes.final_seeds):
        for name in ("curated", "raw"):
            steps += _training(f"{name}, seed {seed}", shares.curated * sizes.wild * sizes.final_epochs)
    if sizes.held_out:
        steps.append(PlannedStep("score", (2 * sizes.final_seeds + 2) * sizes.held_out, "score held-out pairs"))
    return steps


def _selected(shares: Sequence[float], number: int) -> float:
    """Return a round's share of the unverified pool; later rounds than were measured go on as the last one."""
    return shares[min(number, len(shares)) - 1] if shares else 0.0


def _training(name: str, pairs: float) -> list[PlannedStep]:
    return [PlannedStep("train", pairs, f"train {name}"), PlannedStep(PARITY, 1.0, f"parity of {name}")]


def _labelling(taggers: Sequence[str], judges: Sequence[str], tagged: float, judged: float, where: str) -> list[PlannedStep]:
    steps = [PlannedStep(f"tag ({tagger})", tagged, f"tag ({tagger}), {where}") for tagger in taggers]
    steps.append(PlannedStep("embed", tagged, f"embed, {where}"))
    return steps + ([PlannedStep(f"judge ({judge})", judged, f"judge ({judge}), {where}") for judge in judges] if judged else [])
