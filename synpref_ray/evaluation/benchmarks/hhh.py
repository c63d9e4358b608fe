"""HHH alignment (BIG-bench's hhh_alignment): pairs in four subsets.

Official: multiple choice with one right target; for a reward model a pair is right when its right reply has the strictly higher reward. Accuracy per
subset, and pooled over all pairs.
Formats: rows with `prompt`, `chosen`, `rejected` and `source` (`hhh_alignment/<subset>`), or those of the hub: `input` and `targets` (`choices`,
`labels`), one configuration per subset.
"""

from collections.abc import Mapping, Sequence

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import (
    Benchmark,
    CellBuilder,
    Counted,
    HubPart,
    Item,
    Measured,
    Outcome,
    Part,
    ReadItems,
    Row,
    Verified,
)
from synpref_ray.evaluation.benchmarks.fields import one_of, read_name, read_prompt, read_text, read_texts

SUBSETS = ("harmless", "helpful", "honest", "other")
NUM_ITEMS = {"harmless": 58, "helpful": 59, "honest": 61, "other": 43}


def read_hhh(parts: Sequence[Part]) -> ReadItems:
    """Read pairs of either format.

    Raises:
        InputError: a row lacks a field, or its subset is unknown.
    """
    items = []
    for part in parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            name = read_name(row, ("pair_id", "id"), f"{part.name} {number}")
            if "targets" in row:
                replies, prompt = _choices(row, where), read_prompt(row, "input", where)
                subset = next((subset for subset in SUBSETS if subset in part.name.lower()), part.name)
            else:
                replies, prompt = (read_text(row, "chosen", where), read_text(row, "rejected", where)), read_prompt(row, "prompt", where)
                subset = read_text(row, "source", where).rsplit("/", 1)[-1]
            items.append(Item(name, prompt, replies, ((0, 1),), one_of(subset, SUBSETS, where, "subset")))
    return ReadItems(items)


def _choices(row: Row, where: str) -> tuple[str, str]:
    targets = row["targets"]
    labels = targets.get("labels") if isinstance(targets, Mapping) else None
    if not isinstance(targets, Mapping) or not isinstance(labels, Sequence) or sorted(labels) != [0, 1]:
        raise InputError(f"{where}: expected targets with two choices, labelled 1 and 0")
    choices = read_texts(targets, "choices", where)
    return choices[list(labels).index(1)], choices[list(labels).index(0)]


def measure_hhh(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return the accuracy per subset and pooled."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        for cell in ("accuracy", item.subset):
            builder.add(cell, float(outcome.wins[0]), item.prompt_key)
    cells = builder.finish()
    return Measured(cells, dict, {subset: "no item of it" for subset in SUBSETS if subset not in cells})


HHH = Benchmark(
    name="hhh",
    read=read_hhh,
    measure=measure_hhh,
    verified=Verified.HAND_WORKED,
    headline=("accuracy", *SUBSETS),
    num_items=221,
    counted={name: Counted(number, (name,)) for name, number in NUM_ITEMS.items()},
    folders=("hhh", "hhh_alignment"),
    is_part=lambda path: ".jsonl" in path or path.endswith(".parquet"),
    hub=tuple(HubPart("HuggingFaceH4/hhh_alignment", "test", config) for config in SUBSETS),
)
