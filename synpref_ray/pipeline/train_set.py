"""Training a reward model on a set of the workspace, or on a file of pairs.

Paper: Sec. 4 and App. E (the family of eight trained on the curated pairs).
"""

from typing import Any

import pyarrow as pa
from pydantic import Field

from synpref_ray.bundled import find_model
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.ingest.readers import open_binary, read_pair_file
from synpref_ray.ingest.source import SourceConfig
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.licences import with_source_licences
from synpref_ray.pipeline.parity import read_parity
from synpref_ray.pipeline.step_plan import PoolSize, StagePlan, describe_plan, train_work
from synpref_ray.pipeline.training import train_model
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.rules.gold import check_best_rm_training
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.sets import PairSet, iter_shards, load_set


class TrainJobConfig(JobConfig):
    """What to train on what. `set` and `gold_set` are names under sets/; `pairs` and `gold_pairs` are files."""

    name: str = Field(default="reward-model", pattern=r"^[A-Za-z0-9._-]+$")
    """The beginning of the model's name under models/."""
    set: str = ""
    """The training set, a name under sets/; or give `pairs`."""
    pairs: str = ""
    """A file of training pairs, in place of `set`."""
    gold_set: str = ""
    """The set that picks the checkpoint, a name under sets/; or give `gold_pairs`."""
    gold_pairs: str = ""
    """A file of pairs that pick the checkpoint."""
    train: TrainConfig
    parity: ParityConfig = ParityConfig()
    card: CardConfig = CardConfig()
    plan: StagePlan = StagePlan()
    """What the plan of `--dry-run` supposes; a set that is not there yet has the size `plan.pool_pairs` under its name."""


def plan_train(config: TrainJobConfig) -> str:
    """Return what the training takes, as `--dry-run` prints it."""
    name = config.set or config.pairs.rsplit("/", 1)[-1]
    found = _count_pairs(config)
    size = PoolSize(config.plan.pool_pairs.get(name, 0), 0, is_stated=True) if found is None else PoolSize(found, 0)
    return describe_plan([train_work(config.train, f"train {config.name}", size.pairs, config.plan)], {name: size}, ["shards are optimizer steps"])


def _count_pairs(config: TrainJobConfig) -> int | None:
    """Return how many pairs there are to train on, by narrow reads; None where they are not there."""
    if config.pairs:
        return sum(int(chunk.pairs.num_rows) for chunk in read_pair_file(config.pairs, SourceConfig(name="pairs", path=config.pairs)))
    if not config.storage.exists(f"sets/{config.set}.json"):
        return None
    return sum(int(table.num_rows) for table in iter_shards(load_set(config.storage, config.set), []))


def check_train(config: TrainJobConfig) -> None:
    """Check that the data and the backbone are there."""
    if bool(config.set) == bool(config.pairs):
        raise ConfigError("give either set=NAME (a set of the workspace) or pairs=FILE, not both and not neither")
    if config.gold_set and config.gold_pairs:
        raise ConfigError("give gold_set or gold_pairs, not both")
    find_model(config.train.backbone)
    for file in filter(None, (config.pairs, config.gold_pairs)):
        with open_binary(file):
            pass
    for name in filter(None, (config.set, config.gold_set)):
        load_set(config.storage, name)


def read_pairs(file: str) -> tuple[pa.Table, str]:
    """Return the pairs of a file (chosen preferred) and their digest; it must hold pairs only."""
    chunks = list(read_pair_file(file, SourceConfig(name="pairs", path=file)))
    refused = sum(chunk.rejects.num_rows for chunk in chunks)
    if refused:
        raise InputError(f"{file}: {refused} rows are not pairs; ingest the file first (jobs/ingest.py), which keeps them with their reasons")
    table = pa.concat_tables([chunk.pairs for chunk in chunks])
    return table, content_digest(table["pair_id"].to_pylist())


def run_train(config: TrainJobConfig, run: Run) -> str:
    """Train one model; return the closing table."""
    train = load_set(config.storage, config.set) if config.set else read_pairs(config.pairs)
    gold = None
    if config.gold_set or config.gold_pairs:
        gold_set = load_set(config.storage, config.gold_set) if config.gold_set else None
        gold = (gold_set.read(), gold_set.digest) if gold_set is not None else read_pairs(config.gold_pairs)
        for names in iter_shards(train, ["prompt_group"]) if isinstance(train, PairSet) else [train[0]]:
            check_best_rm_training(names, gold[0])
    data_name = config.set or config.pairs.rsplit("/", 1)[-1]
    card = with_source_licences(config.card, config.storage) if config.set else config.card
    model, record = train_model(
        run, config.storage, config.name, train=train, gold=gold, config=config.train, parity=config.parity, card=card, data_name=data_name
    )
    values: dict[str, Any] = record.model_dump(mode="json")
    parity = read_parity(model)
    run.metrics.update({"model": model.path, "training": values, "parity": parity.model_dump(mode="json") if parity else None})
    rows = [("model", config.storage.join(model.path)), ("pairs", str(record.num_pairs)), ("optimizer steps", str(len(record.steps)))]
    rows += [("chosen step", str(record.chosen_step))]
    if record.gold_accuracy is not None:
        rows.append(("gold accuracy", f"{100 * record.gold_accuracy:.1f} % of {record.num_gold_pairs}"))
    if record.stored_gold_accuracy is not None:
        rows.append((f"gold accuracy as stored ({record.config.save_dtype})", f"{100 * record.stored_gold_accuracy:.1f} %"))
    rows += [(f"parity, {side.name}", side.status.value) for side in parity.sides] if parity else [("parity", "not checked")]
    rows += [("last loss", f"{record.steps[-1].loss:.4f}"), ("training seconds", f"{record.seconds['total']:.1f}")]
    return format_table(("", "value"), rows)
