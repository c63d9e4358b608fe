"""What a run will cost and how long it will take: the budget's split, the size that a target needs, when to stop, and the time from measured steps.

Paper: App. F. Reads finished runs of workspaces (events, metrics) and nothing else; no Ray, no model.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.measured_runs import read_runs
from synpref_ray.pipeline.plan_stages import describe_stages
from synpref_ray.planning.cost import Assumptions, Cost, CostModel, Prices, Sizes, Throughputs
from synpref_ray.planning.derived import Compute
from synpref_ray.planning.scaling import Curve, CurvePoint, Interval, StopRule, fit_curve, pairs_for_target, stop_size, stop_verdict
from synpref_ray.planning.split import Policy, Split, check_sizes, sizes_for_stage2, split_budget
from synpref_ray.planning.stages import StagesConfig, derived_throughputs
from synpref_ray.planning.timing import fit_paces
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.tables.storage import Storage

SECONDS_PER_HOUR = 3600.0


class CurveConfig(Settings):
    """Where the scaling curve comes from: its points, or the metrics.json of a finished `jobs/ablate.py` (curve.file)."""

    points: tuple[CurvePoint, ...] = ()
    """The points themselves: pairs and score of each training."""
    file: str = ""
    """The metrics.json of a finished `jobs/ablate.py`, in place of `points`."""
    ceiling: float = 100.0
    """The highest score there is; no limit is fitted above it. Ours: accuracies in percent."""
    num_resamples: NonNegativeInt = 1000
    """Resamples of the bootstrap behind the interval."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)  # ours: the usual two-sided level
    seed: NonNegativeInt = 0
    """Seed of the resamples."""


class MeasuredConfig(Settings):
    """Which finished runs times are taken from."""

    workspaces: tuple[str, ...] = ()
    """Empty: this workspace."""
    gpus: NonNegativeInt = 0
    """GPUs (or, without any, machines) that those runs had: with it, throughputs that are not given are measured ones; 0: they are not."""


class PlanConfig(JobConfig):
    """What to plan; at least one of sizes, budget, target and like."""

    sizes: Sizes = Sizes()
    """Given sizes: their cost; all 0: the budget is split, or the target's size is taken."""
    budget: NonNegativeFloat = 0.0
    """What may be spent, in the currency of the prices; 0: none given."""
    target: float = 0.0
    """The score wanted, on the curve's scale; 0: none."""
    like: Literal["", "demo"] = ""
    """demo: how long a run of `demo_config` takes, by the paces of the measured runs."""
    demo_config: str = "jobs/configs/demo.yaml"
    """The config of that run."""
    demo_data: str = ""
    """The data of that run; empty: the config's own."""
    prices: Prices = Prices()
    throughputs: Throughputs = Throughputs()
    assumptions: Assumptions = Assumptions()
    stages: StagesConfig = StagesConfig()
    compute: Compute = Compute()
    """With a table by stages: where throughputs come from that are neither given nor measured."""
    policy: Policy = Policy()
    curve: CurveConfig = CurveConfig()
    stop: StopRule = StopRule()
    measured: MeasuredConfig = MeasuredConfig()
    expected_seconds: NonNegativeFloat = 0.0
    """Of a run that was measured elsewhere: the estimate is compared with it; 0: it is not."""

    @property
    def measured_storages(self) -> list[Storage]:
        """The workspaces whose finished runs are read."""
        return [Storage(name) for name in self.measured.workspaces] if self.measured.workspaces else [self.storage]


def check_plan(config: PlanConfig) -> None:
    """Check that there is something to plan."""
    if not (config.budget or config.target or config.like or any(config.sizes.as_mapping().values()) or config.curve.points or config.curve.file):
        raise ConfigError("say what to plan: budget=MONEY, target=SCORE (with curve.points or curve.file), sizes.stage2=PAIRS …, or like=demo")
    if config.curve.points and config.curve.file:
        raise ConfigError("give curve.points or curve.file, not both")
    if config.stages.gpus and (config.budget or not any(config.sizes.as_mapping().values()) or not config.prices.gpu_hour):
        raise ConfigError("a table by stages (stages.gpus) needs sizes and prices.gpu_hour, and no budget")
    if config.target and not (config.curve.points or config.curve.file):
        raise ConfigError("a target needs a scaling curve: give curve.points, or curve.file=METRICS of a finished jobs/ablate.py")
    if config.like or (config.measured.gpus and config.prices.gpu_hour):
        for storage in config.measured_storages:
            read_runs(storage)  # before anything is written: a workspace that is not there is none afterwards


def run_plan(config: PlanConfig, run: Run) -> str:
    """Plan; return the closing tables."""
    parts: list[str] = []
    model = _cost_model(config)
    curve = _curve(config)
    wanted = config.sizes
    if curve is not None:
        parts.append(_describe_curve(curve, config, run))
        if config.target:
            size = pairs_for_target(curve, config.target)
            parts.append(_describe_target(size, curve, config, run))
            if not any(wanted.as_mapping().values()):
                wanted = _sizes_for(size.value, model, config)
    if any(wanted.as_mapping().values()):
        parts.append(_describe_by_stages(model, config, run) if config.stages.gpus else _describe_given(wanted, model, config, run))
    elif config.budget:
        split = split_budget(config.budget, model, config.policy)
        parts.append(_describe_split(split, config, run, curve))
    if config.like:
        from synpref_ray.pipeline.plan_time import describe_time  # it reads the demo's configs, which load every library of the pipeline

        parts.append(describe_time(config.measured_storages, config.demo_config, config.demo_data, config.expected_seconds, run))
    return "\n\n".join(parts)


def _cost_model(config: PlanConfig) -> CostModel:
    """Return the prices with throughputs: given ones, for others measured ones, and with a table by stages derived ones for the rest."""
    given = {name: rate for name, rate in config.throughputs.model_dump().items() if rate}
    derived = derived_throughputs(config.compute, config.stages).model_dump() if config.stages.gpus else {}
    measured = _measured_throughputs(config) if config.measured.gpus and config.prices.gpu_hour else {}
    return CostModel(config.prices, Throughputs(**{**derived, **measured, **given}), config.assumptions)


def _measured_throughputs(config: PlanConfig) -> dict[str, float]:
    """Return pairs per GPU hour of the kinds of steps that finished runs have."""
    steps = [step for storage in config.measured_storages for step in read_runs(storage)[0].steps]
    found: dict[str, float] = {}
    about = {"tag": config.stages.taggers, "judge": config.stages.judges}
    on_endpoints = {f"{kind} ({model.name})" for kind, models in about.items() for model in models if not model.billions}
    for kind, pace in fit_paces(steps).items():
        name = "" if kind in on_endpoints else _throughput_of(kind)
        if name and pace.per_unit > 0:
            rate = SECONDS_PER_HOUR / (pace.per_unit * config.measured.gpus)
            found[name] = 1 / (1 / found[name] + 1 / rate) if name in found else rate  # several taggers or judges go one after another
    return found


def _throughput_of(kind: str) -> str:
    """Return the throughput that a kind of step measures: scoring, training, and each tagger's and judge's pass; of an evaluation's replies, a
    benchmark's pairs, leaks and the like there is none."""
    found = re.fullmatch(r"(score|train)|(tag|judge) \(.*\)", kind)
    return (found[1] or found[2]) if found else ""


def _curve(config: PlanConfig) -> Curve | None:
    about = config.curve
    points = about.points
    if about.file:
        folder, _, name = about.file.rpartition("/")
        storage = Storage(folder or ".")
        if not storage.exists(name):
            raise InputError(f"there is no {about.file}")
        values = storage.read_json(name)
        if "scaling" not in values:
            raise InputError(f"{about.file} has no scaling curve: it must be the metrics.json of a jobs/ablate.py with parts=[scaling]")
        points = tuple(CurvePoint(pairs=point["pairs"], score=point["score"]) for point in values["scaling"]["points"])
    if not points:
        return None
    return fit_curve(points, ceiling=about.ceiling, seed=about.seed, num_resamples=about.num_resamples, confidence=about.confidence)


def _sizes_for(pairs: float, model: CostModel, config: PlanConfig) -> Sizes:
    """Return the sizes behind so many curated pairs: kept and flipped ones of Stage 2, with gold and silver by the policy."""
    fraction = config.assumptions.on_curve
    if not fraction:
        raise ConfigError("assumptions.curated_fraction and flipped_fraction are 0: then no size of Stage 2 gives a curated pair")
    return sizes_for_stage2(max(1, round(pairs / fraction)), model, config.policy)


def _describe_curve(curve: Curve, config: PlanConfig, run: Run) -> str:
    at, rule = stop_size(curve.law, config.stop), config.stop
    gain = curve.gain(curve.largest, rule.per_pairs)
    verdict = stop_verdict(gain, rule)
    run.metrics["curve"] = {
        "law": asdict(curve.law), "power": _as_metric(curve.power()), "limit": _as_metric(curve.limit()), "residual": curve.residual,
        "num_points": curve.num_points, "num_sizes": curve.num_sizes, "largest": curve.largest,
    }  # fmt: skip
    run.metrics["stop"] = {
        **rule.model_dump(),
        "size": _number(at),
        "extrapolates": at > curve.largest,
        "gain_at_largest": _as_metric(gain),
        "verdict": verdict,
        "stop": {"stop": True, "go on": False}.get(verdict),
    }
    further = f"{rule.per_pairs:,.0f} further pairs"
    beyond = _beyond(at, curve)
    rows = [
        ("score(n)", f"{curve.law.limit:.2f} - {curve.law.drop:.4g} n^-{curve.law.power:.3f}", ""),
        ("limit", f"{curve.law.limit:.2f}", _ends(curve.limit(), ".2f")),
        ("power", f"{curve.law.power:.3f}", _ends(curve.power(), ".3f")),
        (f"gain of {further}, at {curve.largest:,.0f}", f"{gain.value:+.3f}", _ends(gain, "+.3f")),
        (f"gain below {rule.min_gain:g} from", (f"{at:,.0f} pairs" if math.isfinite(at) else "no size") + beyond, ""),
    ]
    told = f"{verdict}: {further} beyond the largest run gain {gain.value:.3f} ({_ends(gain, '.3f')}), the threshold is {rule.min_gain:g}"
    told += "; they are beyond every run: an extrapolation"
    header = (f"scaling curve, {curve.num_points} runs at {curve.num_sizes} sizes", "value", f"{curve.confidence:.0%} interval")
    return f"{format_table(header, rows)}\n{told}"


def _describe_target(size: Interval, curve: Curve, config: PlanConfig, run: Run) -> str:
    run.metrics["target"] = {"score": config.target, "extrapolates": size.value > curve.largest}
    run.metrics["target"] |= {"pairs": size.value, "low": _number(size.low), "high": _number(size.high)}
    return f"a score of {config.target:g} needs {size.value:,.0f} curated pairs ({_ends(size, ',.0f')}){_beyond(size.value, curve)}"


def _beyond(pairs: float, curve: Curve) -> str:
    return f"; beyond the largest run ({curve.largest:,.0f} pairs): an extrapolation" if pairs > curve.largest else ""


def _describe_given(sizes: Sizes, model: CostModel, config: PlanConfig, run: Run) -> str:
    if config.budget:
        return _describe_split(check_sizes(config.budget, model, sizes, min_stage2=config.policy.min_stage2), config, run, None)
    cost = model.cost(sizes.as_mapping())
    run.metrics["cost"] = _cost_metrics(cost) | {"sizes": sizes.model_dump()}
    return _cost_table(cost)


def _describe_by_stages(model: CostModel, config: PlanConfig, run: Run) -> str:
    return describe_stages(config.sizes, config.assumptions, model.throughputs, config.prices, config.compute, config.stages, run)


def _describe_split(split: Split, config: PlanConfig, run: Run, curve: Curve | None) -> str:
    run.metrics["cost"] = _cost_metrics(split.cost) | {"sizes": split.sizes.model_dump(), "budget": split.budget, "left": split.left}
    lines = [_cost_table(split.cost, [("left of the budget", "", "", f"{split.left:,.2f}"), ("budget", "", "", f"{split.budget:,.2f}")])]
    about = config.assumptions
    curated = about.on_curve * split.sizes.stage2
    kept = f"{about.curated_fraction:.0%} of Stage 2's are kept and {about.flipped_fraction:.0%} of the others flipped"
    lines.append(f"about {curated:,.0f} curated pairs, where {kept}")
    if curve is not None:
        score = curve.score(curated)
        run.metrics["cost"]["score"] = _as_metric(score) | {"extrapolates": curated > curve.largest}
        lines.append(f"the curve puts them at a score of {score.value:.2f} ({_ends(score, '.2f')}){_beyond(curated, curve)}")
    return "\n".join(lines)


def _cost_metrics(cost: Cost) -> dict[str, Any]:
    return {"total": cost.total, "gpu_hours": cost.gpu_hours, "lines": [asdict(line) | {"cost": line.cost} for line in cost.lines]}


def _cost_table(cost: Cost, more: Sequence[tuple[str, str, str, str]] = ()) -> str:
    rows = [(line.name, f"{line.quantity:,.0f} {line.unit}", f"{line.price:,.4g}", f"{line.cost:,.2f}") for line in cost.lines]
    return format_table(("plan", "quantity", "price", "cost"), [*rows, ("all", "", "", f"{cost.total:,.2f}"), *more])


def _ends(interval: Interval, form: str) -> str:
    low, high = (f"{end:{form}}" if math.isfinite(end) else "" for end in (interval.low, interval.high))
    return f"{low} to {high}" if low and high else f"{low} or more" if low else f"{high} or less" if high else "not known"


def _as_metric(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(interval).items()}


def _number(value: float) -> float | None:
    """Return a number as JSON can hold it: None where it is infinite."""
    return value if math.isfinite(value) else None
