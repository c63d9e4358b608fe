"""The workspace's own audit gold as a benchmark, with its attributes: accuracy by task category, objectivity and controversiality.

Paper: Sec. 3.2 looks at an internal human validation set after each round. Our choice: audit gold, which nothing is trained on or picked by.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import Item, ReadItems
from synpref_ray.pipeline.benchmark_files import LoadedBenchmark, benchmark_of_file
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.stage2 import load_stage1
from synpref_ray.rules.gold import GoldSplit
from synpref_ray.schema import Verdict

AUDIT_GOLD = "audit_gold"
ATTRIBUTES = ("task_category", "objectivity", "controversiality")


def audit_gold(config: JobConfig) -> LoadedBenchmark:
    """Return the audit gold of a finished Stage 1.

    Raises:
        InputError: Stage 1 has not finished in this workspace, or there is no audit gold.
    """
    items = gold_items(load_stage1(config).gold.read().to_pylist())
    if not items:
        raise InputError(f"{config.storage.url} has no audit gold")
    return LoadedBenchmark(AUDIT_GOLD, benchmark_of_file(AUDIT_GOLD, many=False), ReadItems(items), is_pair_file=True)


def gold_items(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Return the audit pairs among gold's rows, the reply that people preferred first."""
    items = []
    for row in rows:
        if row["gold_split"] == GoldSplit.AUDIT:
            replies = (row["chosen"], row["rejected"]) if row["human_verdict"] == Verdict.CHOSEN else (row["rejected"], row["chosen"])
            attributes = tuple((name, str(row[name])) for name in ATTRIBUTES if row.get(name) is not None)
            items.append(Item(row["pair_id"], tuple(row["prompt"]), replies, ((0, 1),), attributes=attributes))
    return items
