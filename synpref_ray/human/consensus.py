"""What becomes gold: the consensus of a pair's votes, the quality of annotators, and who settles a dispute.

Paper: Sec. 3.2: a pair that people cannot decide is discarded from gold. How several opinions become one is left open. Our choice: the majority of a
pair's votes, or Dawid and Skene's model of annotators and their errors (crowd-kit), as the config says; a pair without consensus is a dispute for an
admin, and an admin's word stands above any vote.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.human.agreement import Vote


class ConsensusConfig(Settings):
    """When a pair is settled."""

    rule: Literal["majority", "dawid_skene"] = "majority"  # ours
    min_verdicts: int = Field(default=1, ge=1)  # ours: what the queue asks for counts too, whichever is more
    threshold: float = Field(default=0.8, gt=0.5, lt=1.0)  # ours: dawid_skene only, the probability that a verdict must reach
    max_iterations: int = Field(default=100, ge=1)
    """The most iterations of the estimate."""


class Standing(StrEnum):
    """Where a pair stands."""

    WAITING = "waiting"
    DISPUTED = "disputed"
    SETTLED = "settled"
    ADJUDICATED = "adjudicated"


@dataclass(frozen=True)
class Outcome:
    """A pair's standing; `verdict` is null while it waits or is disputed. `confidence`: share of the votes, or the model's probability."""

    standing: Standing
    verdict: str | None
    confidence: float | None
    annotators: tuple[str, ...]


def settle_pairs(
    required: Mapping[str, int],
    votes: Sequence[Vote],
    adjudicated: Mapping[str, tuple[str, str]],
    config: ConsensusConfig,
    *,
    pools: Mapping[str, str] | None = None,
) -> dict[str, Outcome]:
    """Return the outcome of every pair of the queue.

    The model knows only pairs that several people judged; where one verdict is enough, it counts as it was given.

    Args:
        required: by pair, how many verdicts the queue asks for.
        adjudicated: by pair, the admin's verdict and name.
        pools: by pair, its pool. The model is fitted to each pool by itself, so that what people say of a later round leaves the gold of an
            earlier one as it was; without it all pairs are of one pool.
    """
    given: dict[str, dict[str, str]] = {pair_id: {} for pair_id in required}
    for vote in votes:
        given[vote.pair_id][vote.annotator] = vote.verdict
    model: dict[str, dict[str, float]] = {}
    if config.rule == "dawid_skene":
        by_pool: dict[str, list[Vote]] = {}
        for vote in votes:
            if len(given[vote.pair_id]) > 1:  # from a pair that one person judged, the model would only learn to trust them
                by_pool.setdefault((pools or {}).get(vote.pair_id, ""), []).append(vote)
        for part in by_pool.values():
            model |= dawid_skene(part, config.max_iterations)[0]
    outcomes = {}
    for pair_id, said in given.items():
        annotators = tuple(sorted(said))
        if pair_id in adjudicated:
            verdict, admin = adjudicated[pair_id]
            outcomes[pair_id] = Outcome(Standing.ADJUDICATED, verdict, None, tuple(sorted({*annotators, admin})))
        elif len(said) < max(required[pair_id], config.min_verdicts):
            outcomes[pair_id] = Outcome(Standing.WAITING, None, None, annotators)
        else:
            verdict, confidence = _best(model[pair_id]) if pair_id in model else _majority(said)
            is_settled = confidence >= config.threshold if config.rule == "dawid_skene" else confidence > 0.5
            standing = Standing.SETTLED if is_settled else Standing.DISPUTED
            outcomes[pair_id] = Outcome(standing, verdict if is_settled else None, confidence, annotators)
    return outcomes


def dawid_skene(votes: Sequence[Vote], max_iterations: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the probability of each verdict by pair, and by annotator the probability that they say what is so (0 to 1).

    The votes are sorted first: the order in which people answered changes nothing.
    """
    if not votes:
        return {}, {}
    import pandas as pd  # loads for seconds, and only admins and exports ask for it
    from crowdkit.aggregation import DawidSkene

    rows = sorted((vote.pair_id, vote.annotator, vote.verdict) for vote in votes)
    model = DawidSkene(n_iter=max_iterations)
    probabilities = model.fit_predict_proba(pd.DataFrame(rows, columns=["task", "worker", "label"]))
    by_pair = {str(pair_id): {str(label): float(value) for label, value in row.items()} for pair_id, row in probabilities.iterrows()}
    assert model.priors_ is not None
    assert model.errors_ is not None
    priors = {str(label): float(value) for label, value in model.priors_.items()}
    quality: dict[str, float] = {}
    for (worker, label), row in model.errors_.iterrows():  # rows: what was said; columns: what is so
        quality[str(worker)] = quality.get(str(worker), 0.0) + priors.get(str(label), 0.0) * float(row.get(label, 0.0))
    return by_pair, quality


def _majority(said: Mapping[str, str]) -> tuple[str, float]:
    verdict, count = min(Counter(said.values()).items(), key=lambda entry: (-entry[1], entry[0]))
    return verdict, count / len(said)


def _best(probabilities: Mapping[str, float]) -> tuple[str, float]:
    return min(probabilities.items(), key=lambda entry: (-entry[1], entry[0]))
