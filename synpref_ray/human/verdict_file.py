"""Verdicts that people gave elsewhere, imported from a file: Parquet, JSONL or CSV with pair_id, verdict, annotator.

Paper: Sec. 3.2: each pair is verified by people; how several opinions become one is left open. Our choice: one vote per annotator
and pair (a later line replaces an earlier one of the same annotator), more than half of the votes decide, anything else is undecidable.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.human.verdicts import Answer, answers_table, require_pair_ids
from synpref_ray.schema import DropReason, Verdict
from synpref_ray.tables.row_file import read_rows

COLUMNS = ("pair_id", "verdict", "annotator")
UNSETTLED = "unsettled"
"""The verdict of a pair that people have judged without an outcome yet: undecidable to whoever does not wait for them, so that no LLM decides it."""
_VERDICTS = {
    Verdict.CHOSEN.value: Verdict.CHOSEN,
    Verdict.REJECTED.value: Verdict.REJECTED,
    DropReason.UNDECIDABLE.value: Verdict.ABSTAIN,
    UNSETTLED: Verdict.ABSTAIN,
}


class VerdictImportReport(Settings):
    """What a verdict file held, against the pairs that exist."""

    num_lines: int
    """Verdicts in the file, repeated ones included."""
    num_pairs: int
    """Pairs with at least one verdict."""
    num_undecidable: int
    """Pairs that people could not decide, or disagree on."""
    num_unknown: int
    """Pairs in the file that no pool holds; they are left out."""
    unknown_examples: tuple[str, ...]
    """At most three of them."""


@dataclass(frozen=True)
class ImportedVerdicts:
    """The verdicts of one file, one per pair."""

    path: str
    num_lines: int
    answers: Mapping[str, Answer]
    unsettled: frozenset[str] = frozenset()
    """Pairs that people have judged without an outcome yet."""

    def known(self, pair_ids: Collection[str]) -> set[str]:
        """Return which of these pairs have a verdict."""
        return set(pair_ids) & set(self.answers)

    def about(self, pair_ids: Collection[str]) -> "ImportedVerdicts":
        """Return what was said of these pairs alone."""
        wanted = set(pair_ids)
        answers = {pair_id: answer for pair_id, answer in self.answers.items() if pair_id in wanted}
        return replace(self, answers=answers, unsettled=self.unsettled & wanted)

    def verify(self, shard: pa.Table, selected_ids: Collection[str]) -> pa.Table:
        """Return HUMAN_SCHEMA rows for all pairs of the shard, in order; a selected pair that nobody has answered is `not_selected`."""
        selected = set(selected_ids)
        answers = {pair_id: answer for pair_id, answer in self.answers.items() if pair_id in selected}
        return answers_table(require_pair_ids(shard, "verify"), answers, simulated=False)

    def report(self, known_ids: Collection[str]) -> VerdictImportReport:
        """Compare the file with the pairs that exist; unknown pairs are for the caller to show, never an error."""
        unknown = sorted(set(self.answers) - set(known_ids))
        return VerdictImportReport(
            num_lines=self.num_lines,
            num_pairs=len(self.answers),
            num_undecidable=sum(answer.verdict is Verdict.ABSTAIN for answer in self.answers.values()),
            num_unknown=len(unknown),
            unknown_examples=tuple(unknown[:3]),
        )


def import_verdicts(path: str) -> ImportedVerdicts:
    """Read a verdict file and settle each pair.

    Raises:
        InputError: the file is missing, unreadable or of no known format, or a line is not a verdict.
        SchemaError: a column is missing.
    """
    votes: dict[str, dict[str, Verdict]] = {}
    unsettled: set[str] = set()
    num_lines = 0
    for line, row in read_rows(path, what="verdict file", required=COLUMNS):
        num_lines += 1
        pair_id, verdict, annotator = (_text(row, name, path, line) for name in COLUMNS)
        if verdict not in _VERDICTS:
            raise InputError(f"{path}, row {line}: verdict {verdict[:40]!r}; expected {', '.join(_VERDICTS)}")
        votes.setdefault(pair_id, {})[annotator] = _VERDICTS[verdict]
        if verdict == UNSETTLED:
            unsettled.add(pair_id)
    return ImportedVerdicts(path, num_lines, {pair_id: settle(given) for pair_id, given in votes.items()}, frozenset(unsettled))


def settle(votes: Mapping[str, Verdict]) -> Answer:
    """Return the answer of several annotators: the verdict of more than half of them, else undecidable."""
    verdict, count = Counter(votes.values()).most_common(1)[0]
    return Answer(verdict if 2 * count > len(votes) else Verdict.ABSTAIN, ", ".join(sorted(votes)))


def _text(row: Mapping[str, object], name: str, path: str, line: int) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else "an empty one" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{path}, row {line}: expected a text in {name}, found {found}")
    return value.strip()
