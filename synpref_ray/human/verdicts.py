"""What every annotator gives back: one row of HUMAN_SCHEMA for each pair of a shard.

Paper: Sec. 3.2: annotators confirm or reverse a label, and pairs they cannot decide are discarded from gold. Our choice: such a
pair has the verdict `abstain` and the reason `undecidable`; a pair nobody was asked about, or nobody has answered, is null with the reason
`not_selected`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from synpref_ray.errors import SchemaError
from synpref_ray.schema import HUMAN_SCHEMA, DropReason, Verdict


@dataclass(frozen=True)
class Answer:
    """The verdict on one pair as ingested (`abstain`: undecidable), and who gave it."""

    verdict: Verdict
    annotator: str


class Annotator(Protocol):
    """Gives verdicts on the selected pairs of a shard."""

    def known(self, pair_ids: Collection[str]) -> set[str]:
        """Return which of these pairs it can answer."""
        ...

    def verify(self, shard: pa.Table, selected_ids: Collection[str]) -> pa.Table:
        """Return HUMAN_SCHEMA rows for all pairs of the shard, in order; `gold_split` is null, the split is a rule of its own."""
        ...


def require_pair_ids(shard: pa.Table, step: str) -> list[str]:
    """Return the shard's pair ids.

    Raises:
        SchemaError: the shard has none.
    """
    if "pair_id" not in shard.column_names:
        raise SchemaError(f"step {step!r} needs the column pair_id; the shard has {', '.join(shard.column_names)}")
    return [str(pair_id) for pair_id in shard.column("pair_id").to_pylist()]


def answers_table(pair_ids: Collection[str], answers: Mapping[str, Answer], *, simulated: bool) -> pa.Table:
    """Lay answers out as HUMAN_SCHEMA rows in the order of `pair_ids`; a pair without an answer is null, `not_selected`."""
    rows: list[dict[str, object]] = []
    for pair_id in pair_ids:
        answer = answers.get(pair_id)
        if answer is None:
            rows.append({"pair_id": pair_id, "drop_reason": DropReason.NOT_SELECTED.value})
            continue
        reason = DropReason.UNDECIDABLE.value if answer.verdict is Verdict.ABSTAIN else None
        given = {"human_verdict": answer.verdict.value, "annotator": answer.annotator, "simulated": simulated}
        rows.append({"pair_id": pair_id, **given, "drop_reason": reason})
    return pa.Table.from_pylist(rows, schema=HUMAN_SCHEMA)
