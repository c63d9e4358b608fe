"""A stand-in for human annotators where the truth is known: it looks up the asked pairs, no others, and says that it is simulated.

This module owns all that reads verdicts from a truth file; besides the annotator only a report after all decisions may use it, and a test holds
that. (Verification also digests the file's bytes, as those of any verdict file, so that other truth makes other gold.)
Paper: Sec. 3.2, has people here. Our choice: a demo and a test have none, and must not pretend.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
    rows = _read_rows(truth_path)
    asked = rows.filter(pc.is_in(rows["pair_id"], value_set=pa.array(sorted(pair_ids), rows.schema.field("pair_id").type)))
    truth: dict[str, Verdict] = {}
    for pair_id, text in zip(asked["pair_id"].to_pylist(), asked["verdict"].to_pylist(), strict=True):
        if text not in (Verdict.CHOSEN.value, Verdict.REJECTED.value):
            raise _unknown_verdict(truth_path, pair_id, text)
        if truth.setdefault(pair_id, Verdict(text)) is not Verdict(text):
            raise _two_verdicts(truth_path, pair_id)
    return truth


class TruthLookup:
    """A truth file read once, for a report that asks shard by shard; errors are those of `read_truth`. Any number of threads may ask.

    Holds its pair_ids, sorted, and a number for each.
    """

    def __init__(self, truth_path: str):
        self._path = truth_path
        rows = _read_rows(truth_path)
        rows = rows.filter(pc.is_valid(rows["pair_id"]))
        ids = _as_bytes(rows["pair_id"])
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        self._texts = rows["verdict"].combine_chunks().dictionary_encode()
        self._codes = self._texts.indices.fill_null(-1).to_numpy()[order]

    def verdicts(self, pair_ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return what the file says of each of these pairs: chosen, rejected, or null where it says nothing."""
        wanted = _as_bytes(pair_ids)
        first, last = np.searchsorted(self._ids, wanted, "left"), np.searchsorted(self._ids, wanted, "right")
        known = first < last
        for pair in np.flatnonzero(last - first > 1).tolist():
            if len(set(self._codes[first[pair] : last[pair]].tolist())) > 1:
                raise _two_verdicts(self._path, wanted[pair].decode())
        codes = self._codes[first[known]]
        words = self._texts.dictionary.to_pylist()
        for code in np.unique(codes).tolist():
            if code < 0 or words[code] not in (Verdict.CHOSEN.value, Verdict.REJECTED.value):
                bad = wanted[known][codes == code][0].decode()
                raise _unknown_verdict(self._path, bad, words[code] if code >= 0 else None)
        places = np.full(len(wanted), -1, dtype=np.int64)
        places[known] = codes
        return self._texts.dictionary.take(pa.array(places, mask=~known)).cast(pa.string())


def _as_bytes(pair_ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """Return ids as a numpy array of bytes, as wide as the longest."""
    found = pair_ids.cast(pa.binary()).to_pylist()
    return np.array(found, dtype="S") if found else np.zeros(0, dtype="S1")


def _unknown_verdict(truth_path: str, pair_id: str, text: object) -> InputError:
    return InputError(f"the truth file {truth_path} gives {text!r} for pair {pair_id}; expected chosen or rejected")


def _two_verdicts(truth_path: str, pair_id: str) -> InputError:
    return InputError(f"the truth file {truth_path} gives both verdicts for pair {pair_id}; expected one")


def _read_rows(truth_path: str) -> pa.Table:
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
    return rows
