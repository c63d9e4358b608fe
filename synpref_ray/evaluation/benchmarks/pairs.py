"""Any file as a benchmark: pairs, or one preferred reply against several others.

Paper: arXiv:2507.01352, Sec. 3.2: accuracy is the share of pairs whose preferred reply gets the strictly higher reward. Our choice: a row that is
no pair, or cannot be scored, counts as wrong and is named, so that a model cannot gain by refusing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import CellBuilder, Item, Measured, Outcome, Part, ReadItems, Row, Verified
from synpref_ray.evaluation.benchmarks.fields import is_texts, read_name, read_prompt, read_text, read_texts
from synpref_ray.evaluation.benchmarks.rewardmath import measure_one_against_many

PAIRS_VERIFIED = Verified.HAND_WORKED


def pair_items(pairs: Iterable[Mapping[str, Any]], rejects: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Return the items of a pair file as ingest reads it, in the order of its rows.

    Args:
        pairs: with `row`, `pair_id`, `prompt`, `chosen` and `rejected`.
        rejects: with `row` and `reason`: rows that are no pairs.
    """
    items = [(pair["row"], Item(pair["pair_id"], tuple(pair["prompt"]), (pair["chosen"], pair["rejected"]), ((0, 1),))) for pair in pairs]
    items += [(reject["row"], Item(f"row {reject['row']}", (), ("", ""), ((0, 1),), problem=reject["reason"])) for reject in rejects]
    return [item for _, item in sorted(items, key=lambda entry: entry[0])]


def measure_pairs(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return the accuracy."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        builder.add("accuracy", float(outcome.wins[0]), item.prompt_key)
    return Measured(builder.finish(), dict)


def is_one_against_many(row: Mapping[str, object]) -> bool:
    """Whether a row has a list of texts as its rejected replies (an empty one too, which `read_one_against_many` refuses)."""
    return is_texts(row.get("rejected"))


def read_one_against_many(parts: Sequence[Part]) -> ReadItems:
    """Read rows with `prompt`, `chosen` (a text, or a list of one) and `rejected` (a list of one text or more).

    Raises:
        InputError: a row is not so.
    """
    items = []
    for part in parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            replies = (_one_chosen(row, where), *read_texts(row, "rejected", where))
            if len(replies) == 1:
                raise InputError(f"{where}: expected at least one text under 'rejected', found an empty list: there is nothing to beat")
            pairs = tuple((0, place) for place in range(1, len(replies)))
            quality = (1.0, *(0.0 for _ in replies[1:]))
            items.append(Item(read_name(row, ("id",), str(number)), read_prompt(row, "prompt", where), replies, pairs, "", quality))
    return ReadItems(items)


def _one_chosen(row: Row, where: str) -> str:
    if not is_texts(row.get("chosen")):
        return read_text(row, "chosen", where)
    chosen = read_texts(row, "chosen", where)
    if len(chosen) != 1:
        raise InputError(f"{where}: expected one text under 'chosen', found a list of {len(chosen)}: give each preferred reply a row of its own")
    return chosen[0]


__all__ = ["PAIRS_VERIFIED", "is_one_against_many", "measure_one_against_many", "measure_pairs", "pair_items", "read_one_against_many"]
