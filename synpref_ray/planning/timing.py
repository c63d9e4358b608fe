"""How long steps take, from steps that were measured: for every kind of step a start and a pace.

seconds = start + pace · work, fitted to the steps of finished runs with both never below 0. Two steps of one kind with different work tell the two
apart; with one size alone everything counts as pace, which is too much for larger work and too little for smaller. Our choice throughout.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from synpref_ray.errors import InputError

PARITY = "parity"
_ROUND = re.compile(r",? (round \d+|final|both RMs)$")


@dataclass(frozen=True)
class MeasuredStep:
    """One step that ran: its kind, its work in the kind's unit (pairs, times models or epochs where a step has several), its seconds."""

    kind: str
    work: float
    seconds: float


@dataclass(frozen=True)
class PlannedStep:
    """One step of a run to come."""

    kind: str
    work: float
    name: str = ""


@dataclass(frozen=True)
class Pace:
    """What steps of one kind take: `start` seconds, and `per_unit` seconds for every unit of work."""

    start: float
    per_unit: float
    num_steps: int
    num_sizes: int

    def seconds(self, work: float) -> float:
        """Return the seconds of a step with this work."""
        return self.start + self.per_unit * work


@dataclass(frozen=True)
class MeasuredRuns:
    """The steps of finished runs, and the seconds of those runs as wholes."""

    steps: tuple[MeasuredStep, ...]
    run_seconds: float

    @property
    def overhead_per_step(self) -> float:
        """Seconds beside the steps (the start of the cluster, rules, records), spread evenly over them."""
        return max(0.0, self.run_seconds - sum(step.seconds for step in self.steps)) / max(1, len(self.steps))


@dataclass(frozen=True)
class TimeEstimate:
    """The seconds of a run to come, step by step, and the seconds beside the steps."""

    steps: tuple[tuple[PlannedStep, float], ...]
    overhead: float

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.overhead + sum(seconds for _, seconds in self.steps)


def kind_of(name: str) -> str:
    """Return the kind of a step by the name in its event: the same for every round, stage and model."""
    bare = _ROUND.sub("", name)
    if bare.startswith("train "):
        return "train"
    if bare.startswith("score") and not bare.startswith("score replies"):
        return "score"
    return bare.replace(" mismatches", "")


def measured_step(event: Mapping[str, Any]) -> MeasuredStep | None:
    """Return what an event of a run tells about a kind of step; None for an event that is no step, or computed nothing."""
    if event["event"] == PARITY:
        return MeasuredStep(PARITY, 1.0, float(event["seconds"]))
    if event["event"] != "step" or not event["computed"]:
        return None
    times = event.get("epochs", 1) * event.get("models", 1)
    return MeasuredStep(kind_of(event["step"]), float(event.get("judged", event["computed"]) * times), float(event["seconds"]))


def measured_steps(events: Iterable[Mapping[str, Any]]) -> list[MeasuredStep]:
    """Return the steps among a run's events; the seconds of a parity check follow its training's, and are not part of them."""
    return [step for step in map(measured_step, events) if step is not None]


def fit_paces(steps: Sequence[MeasuredStep]) -> dict[str, Pace]:
    """Return the pace of every kind."""
    kinds: dict[str, list[MeasuredStep]] = {}
    for step in steps:
        kinds.setdefault(step.kind, []).append(step)
    return {kind: _fit(found) for kind, found in kinds.items()}


def _fit(steps: Sequence[MeasuredStep]) -> Pace:
    work = np.array([step.work for step in steps])
    seconds = np.array([step.seconds for step in steps])
    num_sizes = len(np.unique(work))
    if num_sizes == 1:
        return Pace(0.0, float(seconds.mean() / work[0]) if work[0] else 0.0, len(steps), 1)
    (start, per_unit), _ = nnls(np.stack([np.ones_like(work), work], axis=1), seconds)
    return Pace(float(start), float(per_unit), len(steps), num_sizes)


def estimate(planned: Sequence[PlannedStep], runs: MeasuredRuns) -> TimeEstimate:
    """Return how long planned steps take at the measured paces.

    Raises:
        InputError: no step of one kind was measured.
    """
    paces = fit_paces(runs.steps)
    if missing := sorted({step.kind for step in planned if step.kind not in paces}):
        raise InputError(f"no finished run here has a step of kind {', '.join(missing)}; there are: {', '.join(sorted(paces)) or 'none'}")
    timed = tuple((step, paces[step.kind].seconds(step.work)) for step in planned)
    return TimeEstimate(timed, runs.overhead_per_step * len(planned))


@dataclass(frozen=True)
class LeftOut:
    """Every measured step estimated from the others of its kind: sums of seconds, and the seconds of steps that have no other."""

    estimated: float
    measured: float
    unchecked: float
    worst: tuple[MeasuredStep, float] | None
    """The step with the largest miss in seconds, and its estimate."""


def leave_one_out(steps: Sequence[MeasuredStep]) -> LeftOut:
    """Estimate each step from the others of its kind; a kind with fewer than two other sizes cannot be checked."""
    estimated = measured = unchecked = 0.0
    worst: tuple[MeasuredStep, float] | None = None
    for place, step in enumerate(steps):
        others = [other for number, other in enumerate(steps) if other.kind == step.kind and number != place]
        if len({other.work for other in others}) < 2:  # a start and a pace
            unchecked += step.seconds
            continue
        guess = _fit(others).seconds(step.work)
        estimated, measured = estimated + guess, measured + step.seconds
        if worst is None or abs(guess - step.seconds) > abs(worst[1] - worst[0].seconds):
            worst = (step, guess)
    return LeftOut(estimated, measured, unchecked, worst)
