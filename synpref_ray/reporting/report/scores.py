"""What runs measured of scorers (reward models, LLM judges) on benchmarks: of each scorer on each benchmark one run's numbers, never a mixture.

Our choice: a reward model is known by its digest, so that two models in folders of one name stay apart, and one model in two folders is one. Of
several runs the one on the largest sample counts, of those one that read the whole official set, and of those the latest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synpref_ray.reporting.report.charts import Point
from synpref_ray.reporting.report.content import interval
from synpref_ray.reporting.report.records import RunRecord, Values

USUAL_LEVEL = 0.95


@dataclass(frozen=True)
class Evaluation:
    """One scorer on one benchmark, as one run measured it; `prefix` is what its metrics' names begin with."""

    benchmark: str
    scorer: str
    folder: str
    """The last name of a reward model's folder; empty for a judge."""
    run: RunRecord
    prefix: str

    @property
    def facts(self) -> Values:
        """What the run read of the benchmark."""
        facts: Values = self.run.metrics["benchmarks"][self.benchmark]
        return facts

    @property
    def shared(self) -> int | None:
        """How many items share their prompt with a pool of the workspace; None where no pool was looked through."""
        found = self.facts.get("contaminated_items")
        return None if found is None else len(found)

    @property
    def missing(self) -> Mapping[str, str]:
        """The metrics that could not be measured, with the reason."""
        found: Mapping[str, str] = self.run.metrics.get(f"{self.prefix}/missing") or {}
        return found


@dataclass(frozen=True)
class Score:
    """One metric of one scorer on one benchmark."""

    benchmark: str
    scorer: str
    folder: str
    metric: str
    value: float
    ends: tuple[float, float] | None
    level: float
    verified: str
    items: int
    official_items: int | None
    """Items that the official set has for this metric; None: not known, or the benchmark is a file of one's own."""
    is_official: bool
    sample_fraction: float
    unscored: int | None
    shared: int | None
    clean: float | None
    """The metric over the items that share their prompt with no pool; None where it was not measured."""
    run: str

    @property
    def point(self) -> Point:
        """The score as a chart shows it."""
        return Point(self.value, *self.ends) if self.ends else Point(self.value)

    @property
    def is_partial(self) -> bool:
        """Whether it is known to be over another set of items than the official one."""
        return self.sample_fraction < 1 or (self.official_items is not None and self.official_items != self.items)


def is_evaluation(run: RunRecord) -> bool:
    """Whether a run measured scorers on benchmarks; ingest counts overlaps under the same name, other jobs have a model or judges too."""
    return isinstance(run.metrics.get("benchmarks"), Mapping) and "model" in run.config


def model_labels(runs: Iterable[RunRecord]) -> dict[str, str]:
    """Return by run what its reward model is called: the last name of its folder, with its digest where two models have one name."""
    names: dict[tuple[str, ...], str] = {}
    of_run: dict[str, tuple[str, ...]] = {}
    for run in filter(is_evaluation, runs):
        path = str(run.config.get("model") or "")
        if path:
            digest = run.metrics.get("model_digest")
            of_run[run.name] = ("digest", str(digest)) if digest else ("path", path)
            names.setdefault(of_run[run.name], folder_of(run))
    labels = _labels(names, lambda identity: identity[1][:8] if identity[0] == "digest" else identity[1])
    return {run: labels[identity] for run, identity in of_run.items()}


def folder_of(run: RunRecord) -> str:
    """Return the last name of the folder of the model that a run evaluated."""
    return str(run.config.get("model") or "").rstrip("/").rsplit("/", 1)[-1]


def judge_labels(runs: Iterable[RunRecord]) -> dict[tuple[str, str], str]:
    """Return by run and judge what the judge is called: `judge NAME`, with its model where two models judge under one name."""
    names: dict[tuple[str, ...], str] = {}
    of_run: dict[tuple[str, str], tuple[str, ...]] = {}
    for run in filter(is_evaluation, runs):
        for entry in run.config.get("judges") or ():
            name = str(entry["judge"]["judge"])
            model = str((entry.get("engine") or {}).get("model", ""))
            of_run[run.name, name] = (name, model)
            names.setdefault((name, model), f"judge {name}")
    labels = _labels(names, lambda identity: identity[1].rstrip("/").rsplit("/", 1)[-1])
    return {place: labels[identity] for place, identity in of_run.items()}


def _labels(names: Mapping[tuple[str, ...], str], tell_apart: Any) -> dict[tuple[str, ...], str]:
    counts = {name: list(names.values()).count(name) for name in names.values()}
    return {identity: f"{name} ({tell_apart(identity)})" if counts[name] > 1 else name for identity, name in names.items()}


def by_completeness(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return runs on larger samples first, in the given order (the latest first) otherwise."""
    return sorted(runs, key=lambda run: -float(run.config.get("sample_fraction", 1.0)))


def read_evaluations(runs: Sequence[RunRecord]) -> list[Evaluation]:
    """Return one evaluation for every scorer and benchmark; runs begin with the latest."""
    models, judges = model_labels(runs), judge_labels(runs)
    found: dict[tuple[str, str], list[Evaluation]] = {}
    for run in filter(is_evaluation, runs):
        for prefix, benchmark, judge in dict.fromkeys(_prefixes(run.metrics, run.metrics["benchmarks"])):
            scorer = judges.get((run.name, judge), f"judge {judge}") if judge else models.get(run.name, "")
            one = Evaluation(benchmark, scorer, "" if judge else folder_of(run), run, prefix)
            found.setdefault((benchmark, scorer), []).append(one)
    return [min(several, key=_rank) for several in found.values()]


def _prefixes(metrics: Values, about: Values) -> Iterable[tuple[str, str, str]]:
    """Yield (prefix, benchmark, judge) for every metric; the judge is empty for the reward model."""
    names = sorted(about, key=len, reverse=True)
    for key in metrics:
        benchmark = next((name for name in names if key.startswith(f"{name}/")), None)
        if benchmark is not None and key.endswith(("/verified", "/unscored", "/missing")):
            rest = key.removeprefix(f"{benchmark}/")
            judge = rest.removeprefix("judge.").partition("/")[0] if rest.startswith("judge.") else ""
            yield f"{benchmark}/judge.{judge}" if judge else benchmark, benchmark, judge


def _rank(evaluation: Evaluation) -> tuple[float, bool]:
    facts = evaluation.facts
    official = facts.get("official_items")
    return -float(facts.get("sample_fraction", 1.0)), official is not None and int(facts["items"]) < official


def scores_of(evaluation: Evaluation) -> list[Score]:
    """Return every metric of an evaluation."""
    metrics, prefix, facts = evaluation.run.metrics, evaluation.prefix, evaluation.facts
    found = []
    for key, verified in metrics.items():
        if not (key.startswith(f"{prefix}/") and key.endswith("/verified")):
            continue
        name = key.removeprefix(f"{prefix}/").removesuffix("/verified")
        value = metrics.get(f"{prefix}/{name}")
        if value is None or (prefix == evaluation.benchmark and name.startswith("judge.")):
            continue
        counted = f"{prefix}/{name}/items" in metrics  # runs of older versions count items by benchmark only
        found.append(
            Score(
                *(evaluation.benchmark, evaluation.scorer, evaluation.folder, name, float(value)),
                ends=interval(metrics.get(f"{prefix}/{name}/low"), metrics.get(f"{prefix}/{name}/high")),
                level=level_of(evaluation.run),
                verified=str(verified),
                items=int(metrics[f"{prefix}/{name}/items"] if counted else facts["items"]),
                official_items=metrics[f"{prefix}/{name}/official_items"] if counted else facts.get("official_items"),
                is_official=bool(facts.get("is_official", facts.get("official_items"))),
                sample_fraction=float(facts.get("sample_fraction", 1.0)),
                unscored=metrics.get(f"{prefix}/unscored"),
                shared=evaluation.shared,
                clean=metrics.get(f"{prefix}/clean/{name}"),
                run=evaluation.run.name,
            )
        )
    return found


def read_scores(runs: Sequence[RunRecord]) -> list[Score]:
    """Return every metric of every scorer on every benchmark."""
    return [score for evaluation in read_evaluations(runs) for score in scores_of(evaluation)]


def level_of(run: RunRecord) -> float:
    """Return the level of a run's intervals."""
    return float(run.config.get("confidence", USUAL_LEVEL))


def level_name(levels: Iterable[float]) -> str:
    """Return what a column of intervals of these levels is called."""
    shown = [f"{100 * level:.4g} %" for level in sorted(set(levels) or {USUAL_LEVEL}, reverse=True)]
    return f"{' or '.join(shown)} interval"
