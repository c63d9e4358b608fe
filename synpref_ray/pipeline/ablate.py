"""Ablations: what curation is worth apart from scale, and what more pairs are worth: sets of one size, matched controls, several seeds, one table.

Paper: Figs. 5 and 6, and Fig. 5's scaling curve. Every model is trained with the same settings on as many pairs; what differs is the set and the
seed. Numbers are accuracies on held-out pairs: their mean over seeds with a bootstrap interval over prompts, and the spread of the seeds beside it,
since the interval does not hold that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt

from synpref_ray.bundled import find_model
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.evaluation.accuracy import SeedAccuracy, paired_bootstrap, seed_accuracy
from synpref_ray.evaluation.matching import NUMBERS, SMALL_DIFFERENCE, standardised_differences
from synpref_ray.pipeline.ablation_pairs import Wild, count_words, open_wild, read_wild
from synpref_ray.pipeline.ablation_sets import Arm, Selection, ladder_arms, matched_arms, matched_size, save_arm, scaling_arms, shared_groups
from synpref_ray.pipeline.benchmark_files import read_pair_items
from synpref_ray.pipeline.evaluate import correct_flags
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.pipeline.score_file import FileScoring, score_file
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.stage2 import Stage1Result, load_stage1
from synpref_ray.pipeline.tag_steps import TagStepConfig, tag_pools
from synpref_ray.pipeline.training import TrainingPairs, train_model
from synpref_ray.planning.scaling import MIN_SIZES, Curve, CurvePoint, fit_curve
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_share, format_table
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.rules.gold import check_best_rm_training
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.sets import PairSet, iter_shards

Part = Literal["matched", "ladder", "scaling"]
Flags = npt.NDArray[np.bool_]
WITH_GOLD = "+ human"
TABLE_PAIRS = 20_000  # ours: smaller sets are trained on as one table, larger ones shard by shard
BASELINES = {"matched": "curated", "ladder": "seed"}


class AblateConfig(JobConfig):
    """What is compared, on how many pairs, with which seeds, and how models are trained and tested."""

    parts: tuple[Part, ...] = ("ladder", "matched", "scaling")
    """Which comparisons to make."""
    held_out: str
    """A file of pairs that no pool shares a prompt with: what every model is tested on. Pairs with a prompt of a training set are left out."""
    pairs: PositiveInt
    """Pairs of every set of `matched`, and pairs that every rung of the ladder adds; fewer where a kind has fewer."""
    seed_pairs: PositiveInt
    """Pairs of the ladder's lowest rung; fewer where there are fewer."""
    fractions: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Parts of the curated pairs on the scaling curve."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)  # ours: three training runs of each set
    selection_seed: int = 0
    """Which pairs are drawn, where a set is drawn by chance."""
    taggers: tuple[TagStepConfig, ...] = ()
    """Tag the whole wild pool with these first, so that categories can be matched; empty: tags that are there, else sources."""
    train: TrainConfig
    parity: ParityConfig = ParityConfig(enabled=False)  # ours: these models are measured, and curate nothing
    score: ScoreConfig = ScoreConfig()
    reading: FileScoring = FileScoring()
    card: CardConfig = CardConfig()
    models_per_pass: PositiveInt = 6  # ours: held in memory together while the held-out pairs are scored
    num_resamples: int = Field(default=2000, ge=1)
    """Bootstrap samples behind every interval."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)  # ours: the usual two-sided level

    @property
    def selection(self) -> Selection:
        """How arms are drawn."""
        return Selection(self.pairs, self.seed_pairs, self.fractions, self.selection_seed)


@dataclass(frozen=True)
class _Arms:
    arms: list[Arm]
    sets: list[PairSet]


def check_ablate(config: AblateConfig) -> None:
    """Check the held-out file, the backbone, and that both stages have finished."""
    if not config.parts or len(set(config.parts)) != len(config.parts):
        raise ConfigError(f"parts must name each of matched, ladder and scaling at most once, found {', '.join(config.parts) or 'none'}")
    if "scaling" in config.parts and (len(set(config.fractions)) < MIN_SIZES or not all(0 < fraction <= 1 for fraction in config.fractions)):
        raise ConfigError(f"the scaling curve needs {MIN_SIZES} different fractions above 0 and at most 1, found {list(config.fractions)}")
    find_model(config.train.backbone)
    read_held_out(config)
    load_stage1(config)
    open_wild(config.storage)


def run_ablate(config: AblateConfig, run: Run) -> str:
    """Build the sets, train, test; return the closing tables. What is there already is not made again."""
    storage, before = config.storage, load_stage1(config)
    tables = open_wild(storage)
    tags = tag_pools(run, "tag for ablations", [tables.pool], config.taggers).merged[0] if config.taggers else None
    wild = read_wild(tables, count_words(run, tables.pool), tags)
    arms = _arms(config, wild, before)
    held_out = _without_training_prompts(config, run, read_held_out(config), arms)
    built = _Arms(arms, [save_arm(storage, arm) for arm in arms])
    models = _train(config, run, built, before)
    flags = [of_arm[:, held_out.tested] for of_arm in _test(config, run, models)]
    prompts = [prompt for prompt, tested in zip(held_out.prompts, held_out.tested, strict=True) if tested]
    parts: list[str] = []
    for part in config.parts:
        of_part = [place for place, arm in enumerate(arms) if arm.part == part]
        parts.append(_describe_part(config, run, part, [arms[place] for place in of_part], [flags[place] for place in of_part], prompts, wild))
    if num_left_out := int((~held_out.tested).sum()):
        parts.append(f"{num_left_out} of {len(held_out.prompts)} held-out pairs share their prompt with a set of this run: left out of all numbers")
    if before.simulated_gold:
        parts.append("gold is SIMULATED: an annotator that reads known truth for the budgeted pairs")
    return "\n\n".join(parts)


def _arms(config: AblateConfig, wild: Wild, before: Stage1Result) -> list[Arm]:
    makers = {
        "matched": lambda: matched_arms(wild, config.selection),
        "ladder": lambda: ladder_arms(config.storage, wild, before, config.selection),
        "scaling": lambda: scaling_arms(wild, config.selection),
    }
    return [arm for part in config.parts for arm in makers[part]()]


def _train(config: AblateConfig, run: Run, built: _Arms, before: Stage1Result) -> list[list[StoredModel]]:
    """Train a model for every arm and seed; arms of the same pairs share theirs (a model is named by its data and settings)."""
    gold = before.gold.read()
    models: list[list[StoredModel]] = []
    done = 0
    for arm, pairs in zip(built.arms, built.sets, strict=True):
        if arm.name != WITH_GOLD:
            for groups in iter_shards(pairs, ["prompt_group"]):
                check_best_rm_training(groups, gold)
        table = pairs.read() if arm.num_pairs <= TABLE_PAIRS else None
        train: TrainingPairs = pairs if table is None else (table, pairs.digest)
        of_arm = []
        for seed in config.seeds:
            settings = config.train.model_copy(update={"seed": seed})
            card = with_source_licences(config.card, config.storage)
            model, _ = train_model(
                run,
                config.storage,
                f"ablation-seed{seed}",
                train=train,
                gold=None,
                config=settings,
                parity=config.parity,
                card=card,
                data_name=pairs.name,
            )
            of_arm.append(model)
            done += 1
            run.event("ablation", part=arm.part, arm=arm.name, seed=seed, model=model.name, done=done, of=len(built.arms) * len(config.seeds))
        models.append(of_arm)
    return models


def _test(config: AblateConfig, run: Run, models: Sequence[Sequence[StoredModel]]) -> list[Flags]:
    """Return for every arm whether each seed's model is right about each held-out pair, (S, P); several models go through the file at once."""
    names = list(dict.fromkeys(model.name for of_arm in models for model in of_arm))
    folders = {model.name: model.local_folder() for of_arm in models for model in of_arm}
    flags: dict[str, Flags] = {}
    for first in range(0, len(names), config.models_per_pass):
        some = names[first : first + config.models_per_pass]
        scored = score_file(run, config.storage, config.held_out, [folders[name] for name in some], config.reading, config.score)
        flags |= {name: correct_flags(one)[0] for name, one in zip(some, scored, strict=True)}
    return [np.array([flags[model.name] for model in of_arm]) for of_arm in models]


@dataclass(frozen=True)
class HeldOut:
    """The rows of the held-out file, (P,) each: the group of the prompt, which intervals draw together, and whether models are tested on it."""

    prompts: list[str]
    tested: Flags


def read_held_out(config: AblateConfig) -> HeldOut:
    """Read the prompts of the held-out file, as it is read for scoring.

    Raises:
        InputError: it cannot be read, or holds no pair.
    """
    items = read_pair_items(config.held_out, config.reading.columns)
    if all(item.problem is not None for item in items):
        raise InputError(
            f"held_out={config.held_out} holds no pair ({len(items)} rows): expected prompt, chosen and rejected, a text or messages each"
        )
    return HeldOut([item.prompt_key for item in items], np.ones(len(items), dtype=bool))


def _without_training_prompts(config: AblateConfig, run: Run, held_out: HeldOut, arms: Sequence[Arm]) -> HeldOut:
    """Return which rows share no prompt with any set of this run, so that all models are tested on the same ones; counted in the metrics.

    Raises:
        InputError: none is left.
    """
    shared = shared_groups(arms, set(held_out.prompts))
    tested = np.array([prompt not in shared for prompt in held_out.prompts], dtype=bool)
    run.metrics["held_out"] = {"rows": len(tested), "left_out_as_trained_on": int((~tested).sum())}
    if not tested.any():
        raise InputError(f"held_out={config.held_out}: every pair shares its prompt with a set to train on; name pairs that no pool has")
    return HeldOut(held_out.prompts, tested)


def _describe_part(
    config: AblateConfig, run: Run, part: Part, arms: Sequence[Arm], flags: Sequence[Flags], prompts: Sequence[str], wild: Wild
) -> str:
    measured = {
        arm.name: seed_accuracy(f, groups=prompts, num_resamples=config.num_resamples, confidence=config.confidence)
        for arm, f in zip(arms, flags, strict=True)
    }
    record: dict[str, Any] = {
        "arms": {arm.name: {"rule": arm.rule, "pairs": arm.num_pairs, **asdict(measured[arm.name])} for arm in arms},
        "seeds": list(config.seeds),
        "held_out": config.held_out,
    }
    run.metrics[part] = record
    if part == "scaling":
        return _describe_scaling(config, record, arms, flags, measured)
    base = next(place for place, arm in enumerate(arms) if arm.name == BASELINES[part])
    rows = []
    for arm, of_arm in zip(arms, flags, strict=True):
        difference = paired_bootstrap(of_arm, flags[base], groups=prompts, num_resamples=config.num_resamples, confidence=config.confidence)
        record["arms"][arm.name][f"minus_{BASELINES[part]}"] = asdict(difference)
        gap = (
            "-"
            if arm.name == BASELINES[part]
            else f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
        )
        rows.append((arm.name, str(arm.num_pairs), *_cells(measured[arm.name]), gap))
    header = (
        f"{part}, {len(config.seeds)} seeds",
        "pairs",
        "right",
        f"{config.confidence:.0%} interval",
        "seeds",
        f"minus {BASELINES[part]}, points",
    )
    lines = [format_table(header, rows), *(f"{arm.name}: {arm.rule}" for arm in arms)]
    if part == "matched":
        record["smaller_because"] = matched_size(wild, config.selection)[1] or None
        lines[1:1] = [*([record["smaller_because"]] if record["smaller_because"] else []), "", _balance(arms, record, wild), ""]
    return "\n".join(lines)


def _cells(measured: SeedAccuracy) -> tuple[str, str, str]:
    ends = f"{100 * measured.low:.1f} to {100 * measured.high:.1f}"
    return format_share(measured.accuracy, 1), ends, ", ".join(f"{100 * one:.1f}" for one in measured.by_seed)


def _balance(arms: Sequence[Arm], record: dict[str, Any], wild: Wild) -> str:
    """Return the table of balance: how far every set is from the curated one in what controls are matched on."""
    reference = next(arm.facts for arm in arms if arm.name == BASELINES["matched"])
    assert reference is not None
    record["category_from"] = wild.category_from
    rows = []
    for arm in arms:
        if arm.facts is not None:
            found = standardised_differences(reference, arm.facts)
            record["arms"][arm.name]["standardised_differences"] = {name: value if np.isfinite(value) else None for name, value in found.items()}
            means = [f"{found[name]:+.2f}{' *' if abs(found[name]) > SMALL_DIFFERENCE else ''}" for name in ("category", *NUMBERS)]
            rows.append((arm.name, *means, f"{arm.facts.numbers[:, 2].mean():.2f}"))
    header = (
        "balance: standardised differences from curated",
        f"category ({wild.category_from})",
        "log words",
        "|margin|",
        "label noise",
        "mean noise",
    )
    return f"{format_table(header, rows)}\n* above {SMALL_DIFFERENCE}: not balanced in this (the arms that are not matched are not meant to be)"


def _describe_scaling(
    config: AblateConfig, record: dict[str, Any], arms: Sequence[Arm], flags: Sequence[Flags], measured: Mapping[str, SeedAccuracy]
) -> str:
    points = [CurvePoint(pairs=arm.num_pairs, score=100 * float(one.mean())) for arm, of_arm in zip(arms, flags, strict=True) for one in of_arm]
    curve: Curve = fit_curve(points, ceiling=100.0, seed=config.selection_seed, confidence=config.confidence)
    limit, power = curve.limit(), curve.power()
    record |= {
        "points": [point.model_dump() for point in points],
        "law": asdict(curve.law),
        "limit": asdict(limit),
        "power": asdict(power),
        "residual": curve.residual,
    }
    rows = []
    for arm in arms:
        at = curve.score(arm.num_pairs)
        fitted = f"{at.value:.1f} ({at.low:.1f} to {at.high:.1f})"
        record["arms"][arm.name]["fitted"] = asdict(at)
        rows.append((arm.name, str(arm.num_pairs), *_cells(measured[arm.name]), fitted))
    header = (f"scaling, {len(config.seeds)} seeds", "pairs", "right", f"{config.confidence:.0%} interval", "seeds", "fitted")
    law = f"score(n) = {curve.law.limit:.1f} - {curve.law.drop:.4g} n^-{curve.law.power:.2f}"
    ends = f"limit {limit.low:.1f} to {limit.high:.1f}, power {power.low:.2f} to {power.high:.2f}"
    return f"{format_table(header, rows)}\n{law}; {ends}; runs scatter by {curve.residual:.1f} points around it"
