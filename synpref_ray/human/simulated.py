"""A stand-in for human annotators where the truth is known: it looks up the asked pairs, no others, and says that it is simulated.

This module owns the only function that reads verdicts from a truth file; besides the annotator only a report after all decisions may call it, and
a test holds that. (Verification also digests the file's bytes, as those of any verdict file, so that other truth makes other gold.)
Paper: Sec. 3.2, Step 1, has people here. Our choice: a demo and a test have none, and must not pretend.
"""

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.human.verdicts import Answer, answers_table, require_pair_ids
from synpref_ray.schema import Verdict
from synpref_ray.tables.files import open_file

SIMULATED_ANNOTATOR = "simulated"


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Answers with known truth. A selected pair that the truth file lacks is undecidable and makes no gold."""

    truth_path: str

    def known(self, pair_ids: Collection[str]) -> set[str]:
        """Return which of these pairs the truth file knows, and nothing of what it says."""
        return set(read_truth(self.truth_path, pair_ids))

    def verify(self, shard: pa.Table, selected_ids: Collection[str]) -> pa.Table:
        """Return HUMAN_SCHEMA rows for all pairs of the shard, in order; only selected pairs are looked up."""
        pair_ids = require_pair_ids(shard, "verify")
        selected = set(selected_ids)
        asked = [pair_id for pair_id in pair_ids if pair_id in selected]
        truth = read_truth(self.truth_path, asked) if asked else {}
        answers = {pair_id: Answer(truth.get(pair_id, Verdict.ABSTAIN), SIMULATED_ANNOTATOR) for pair_id in asked}
        return answers_table(pair_ids, answers, simulated=True)


def read_truth(truth_path: str, pair_ids: Collection[str]) -> dict[str, Verdict]:
    """Read the true verdicts of the named pairs, and of no others, from a Parquet file (pair_id, verdict: chosen | rejected).

    Raises:
        InputError: the file is missing or unreadable, holds another verdict, or holds both verdicts for one pair.
        SchemaError: a column is missing.
    """
    try:
        with open_file(truth_path) as stream:
            table = pq.ParquetFile(stream)
            missing = [name for name in ("pair_id", "verdict") if name not in table.schema_arrow.names]
            rows = None if missing else table.read(columns=["pair_id", "verdict"])
    except FileNotFoundError:
        raise InputError(f"there is no truth file {truth_path}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"the truth file {truth_path} is not a complete Parquet file: {' '.join(str(error).split())}") from None
    if rows is None:
        raise SchemaError(f"the truth file {truth_path} lacks the column {', '.join(missing)}; expected pair_id and verdict")
    asked = rows.filter(pc.is_in(rows["pair_id"], value_set=pa.array(sorted(pair_ids), rows.schema.field("pair_id").type)))
    truth: dict[str, Verdict] = {}
    for pair_id, text in zip(asked["pair_id"].to_pylist(), asked["verdict"].to_pylist(), strict=True):
        if text not in (Verdict.CHOSEN.value, Verdict.REJECTED.value):
            raise InputError(f"the truth file {truth_path} gives {text!r} for pair {pair_id}; expected chosen or rejected")
        if truth.setdefault(pair_id, Verdict(text)) is not Verdict(text):
            raise InputError(f"the truth file {truth_path} gives both verdicts for pair {pair_id}; expected one")
    return truth
