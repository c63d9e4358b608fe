"""What the queue has found so far: votes, outcomes, agreement, quality; for the admin page, the status table and the export.

The export is Parquet files: `verdicts` (a line per judged pair, as `verdict_file` reads it), `votes` (the whole log) and `attributes` (what
people made of each judged pair's attributes: the truth that taggers can be measured against), `skips` and `adjudications`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from sqlalchemy import func, select

from synpref_ray.human.agreement import Agreement, Vote, agreement_by_category, measure_agreement
from synpref_ray.human.consensus import ConsensusConfig, Outcome, Standing, dawid_skene, settle_pairs
from synpref_ray.human.database import Adjudication, Assignment, AuditEvent, Database, Item, NotFound, Refused, Role, State, User, VerdictRow, record
from synpref_ray.human.protocol import UNDECIDABLE
from synpref_ray.human.verdict_file import UNSETTLED

ATTRIBUTES = ("task_category", "objectivity", "controversiality", "desired_attributes", "annotation_guideline")
NO_CATEGORY = "none"
VERDICTS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("standing", pa.string(), nullable=False),
        pa.field("confidence", pa.float64()),
        pa.field("num_votes", pa.int32(), nullable=False),
        pa.field("pool", pa.string(), nullable=False),
        pa.field("selected_by", pa.string(), nullable=False),
    ]
)
VOTES_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("revision", pa.int32(), nullable=False),
        pa.field("counts", pa.bool_(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("reply_1", pa.string(), nullable=False),
        pa.field("strength", pa.int32(), nullable=False),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("search_link", pa.string()),
        pa.field("code_run", pa.string()),
        pa.field("llm_helped", pa.bool_()),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("focus_seconds", pa.float64(), nullable=False),
        pa.field("created_at", pa.float64(), nullable=False),
    ]
)
SKIPS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("annotator", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("created_at", pa.float64(), nullable=False),
    ]
)
WORDS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("admin", pa.string(), nullable=False),
        pa.field("counts", pa.bool_(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("created_at", pa.float64(), nullable=False),
    ]
)
EDITED_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ATTRIBUTES),
        pa.field("changed", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Worker:
    """An annotator's count; `seconds` is the median time of a verdict, `quality` the model's probability that they say what is so."""

    name: str
    role: str
    active: bool
    num_verdicts: int
    num_skipped: int
    seconds: float | None
    quality: float | None


@dataclass(frozen=True)
class Snapshot:
    """One state of everything that was said."""

    items: Mapping[str, Mapping[str, Any]]  # pair_id: id, pool, selected_by, required, attributes
    votes: tuple[Vote, ...]
    edits: Mapping[str, tuple[Mapping[str, Any], ...]]  # pair_id: the attributes of each vote that counts
    outcomes: Mapping[str, Outcome]
    workers: tuple[Worker, ...]
    stuck: frozenset[str]  # pairs that nobody is left to judge

    @property
    def standings(self) -> Counter[str]:
        """Count pairs by where they stand."""
        return Counter(outcome.standing.value for outcome in self.outcomes.values())

    @property
    def to_adjudicate(self) -> list[str]:
        """Disputed pairs, and pairs that wait and that nobody is left to judge or asked to, in the order of the queue."""
        waiting = {Standing.DISPUTED} | {Standing.WAITING}
        found = []
        for pair_id, item in self.items.items():
            standing = self.outcomes[pair_id].standing
            if pair_id in self.stuck or (standing in waiting and (standing is Standing.DISPUTED or item["complete"])):
                found.append(pair_id)
        return found

    def agreement(self) -> dict[str, Agreement]:
        """Return the agreement overall (`all`) and by task category."""
        return {"all": measure_agreement(self.votes), **agreement_by_category(self.votes)}


class Results:
    """Reads what was said, and writes an admin's word. The last snapshot is kept until somebody says something more."""

    def __init__(self, database: Database, config: ConsensusConfig):
        self._db = database
        self._config = config
        self._kept: tuple[object, Snapshot] | None = None

    def snapshot(self) -> Snapshot:
        """Return the state now."""
        with self._db.read() as session:
            state = tuple(session.scalar(select(func.count()).select_from(table)) for table in (VerdictRow, Adjudication, Item, Assignment))
            skipped = session.scalar(select(func.count()).where(Assignment.state == State.SKIPPED.value))
            people = tuple(tuple(row) for row in session.execute(select(User.id, User.role, User.active).order_by(User.id)))
        key = (state, skipped, people)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._read())
        return self._kept[1]

    def adjudicate(self, admin_id: int, item_id: int, verdict: str, rationale: str, words_seen: int) -> None:
        """Store an admin's word on a pair; it overrides votes and earlier words.

        Args:
            words_seen: how many words on this pair the admin has seen.

        Raises:
            Refused: no such pair or verdict, or another word came meanwhile.
        """
        if verdict not in ("chosen", "rejected", UNDECIDABLE) or len(rationale) > 10_000 or "\x00" in rationale:
            raise Refused("A verdict is one reply or the other, or undecidable.")
        now = self._db.clock()
        with self._db.write() as session:
            item = session.get(Item, item_id, with_for_update=True) if 0 < item_id < 2**31 else None
            if item is None:
                raise NotFound("There is no such pair.")
            if session.scalar(select(func.count()).where(Adjudication.item_id == item.id)) != words_seen:
                raise Refused("This pair was settled since you opened its page: nothing was stored. Open it again and read what was said.")
            item.complete = True
            session.add(Adjudication(item_id=item.id, user_id=admin_id, verdict=verdict, rationale=rationale.strip(), created_at=now))
            record(session, at=now, user_id=admin_id, action="adjudicate", subject=item.pair_id, verdict=verdict)

    def _read(self) -> Snapshot:
        with self._db.read() as session:
            rows = select(Item.id, Item.pair_id, Item.pool, Item.selected_by, Item.required, Item.complete, Item.attributes).order_by(
                Item.rank, Item.id
            )
            found = [row._asdict() for row in session.execute(rows)]
            users = list(session.scalars(select(User).order_by(User.name)))
            said = select(VerdictRow, Assignment.item_id, Assignment.user_id).join(Assignment, VerdictRow.assignment_id == Assignment.id)
            said = said.where(VerdictRow.revision == Assignment.revision, Assignment.state == State.DONE.value).order_by(VerdictRow.id)
            counting = list(session.execute(said))
            closed = select(Assignment.item_id, Assignment.user_id, Assignment.state).where(Assignment.state != State.LEASED.value)
            closings = list(session.execute(closed))
            words = list(session.scalars(select(Adjudication).order_by(Adjudication.id)))
        items, pair_of, name_of = {row["pair_id"]: row for row in found}, {row["id"]: row["pair_id"] for row in found}, {u.id: u.name for u in users}
        votes: list[Vote] = []
        edits: dict[str, list[Mapping[str, Any]]] = {}
        seconds: dict[int, list[float]] = {}
        for row, item_id, user_id in counting:
            pair_id = pair_of[item_id]
            votes.append(Vote(pair_id, name_of[user_id], row.verdict, row.attributes.get("task_category") or NO_CATEGORY))
            edits.setdefault(pair_id, []).append(row.attributes)
            seconds.setdefault(user_id, []).append(row.seconds)
        adjudicated = {pair_of[word.item_id]: (word.verdict, name_of[word.user_id]) for word in words}
        required, pools = ({pair_id: row[name] for pair_id, row in items.items()} for name in ("required", "pool"))
        outcomes = settle_pairs(required, votes, adjudicated, self._config, pools=pools)
        shared = {
            pair_id for pair_id, given in edits.items() if len(given) > 1
        }  # of a pair that one person judged, the model only learns to trust them
        _, quality = dawid_skene([vote for vote in votes if vote.pair_id in shared], self._config.max_iterations)
        skipped = Counter(user_id for _, user_id, state in closings if state == State.SKIPPED.value)
        workers = tuple(
            Worker(u.name, u.role, u.active, len(s := seconds.get(u.id, [])), skipped[u.id], _median(s), quality.get(u.name)) for u in users
        )
        hands = {u.id for u in users if u.active and u.role == Role.ANNOTATOR.value}
        closed_by: dict[int, set[int]] = {}
        for item_id, user_id, _ in closings:
            closed_by.setdefault(item_id, set()).add(user_id)
        stuck = {row["pair_id"] for row in found if not row["complete"] and hands and hands <= closed_by.get(row["id"], set())}
        return Snapshot(items, tuple(votes), {name: tuple(given) for name, given in edits.items()}, outcomes, workers, frozenset(stuck))


def verdict_table(snapshot: Snapshot) -> pa.Table:
    """Return VERDICTS_SCHEMA rows of the pairs that people have judged, in the order of the queue; `unsettled` until there is an outcome."""
    rows = []
    for pair_id, item in snapshot.items.items():
        outcome = snapshot.outcomes[pair_id]
        if outcome.annotators:
            about = {"pair_id": pair_id, "pool": item["pool"], "selected_by": item["selected_by"], "num_votes": len(snapshot.edits.get(pair_id, ()))}
            said = {"verdict": outcome.verdict or UNSETTLED, "annotator": ", ".join(outcome.annotators), "confidence": outcome.confidence}
            rows.append({**about, **said, "standing": outcome.standing.value})
    return pa.Table.from_pylist(rows, schema=VERDICTS_SCHEMA)


def attribute_table(snapshot: Snapshot) -> pa.Table:
    """Return EDITED_SCHEMA rows of every judged pair: each attribute as most of its annotators have it (a tie keeps the tagger's)."""
    rows: list[dict[str, Any]] = []
    for pair_id, item in snapshot.items.items():
        given = snapshot.edits.get(pair_id)
        if given:
            agreed = {name: _most(item["attributes"].get(name), [values.get(name) for values in given]) for name in ATTRIBUTES}
            changed = [name for name in ATTRIBUTES if _plain(agreed[name]) != _plain(item["attributes"].get(name))]
            rows.append({"pair_id": pair_id, **agreed, "changed": changed})
    return pa.Table.from_pylist(rows, schema=EDITED_SCHEMA)


def vote_table(database: Database) -> pa.Table:
    """Return VOTES_SCHEMA: every line that was ever said, what was taken back too."""
    said = select(VerdictRow, Assignment, Item.pair_id, User.name).join(Assignment, VerdictRow.assignment_id == Assignment.id)
    said = said.join(Item, Assignment.item_id == Item.id).join(User, Assignment.user_id == User.id).order_by(VerdictRow.id)
    rows: list[dict[str, Any]] = []
    with database.read() as session:
        for row, assignment, pair_id, name in session.execute(said):
            counts = row.revision == assignment.revision and assignment.state == State.DONE.value
            about = {"pair_id": pair_id, "annotator": name, "counts": counts, "reply_1": "rejected" if assignment.swapped else "chosen"}
            plain = ("revision", "verdict", "strength", "rationale", "seconds", "focus_seconds", "created_at")
            rows.append({**about, **{key: getattr(row, key) for key in plain}, **row.evidence})
    return pa.Table.from_pylist(rows, schema=VOTES_SCHEMA)


def skip_table(database: Database) -> pa.Table:
    """Return SKIPS_SCHEMA: who gave which pair back, and why."""
    said = select(AuditEvent, User.name).join(User, AuditEvent.user_id == User.id).where(AuditEvent.action == "skip").order_by(AuditEvent.id)
    with database.read() as session:
        rows = [
            {"pair_id": row.subject, "annotator": name, "reason": row.detail["reason"], "created_at": row.at} for row, name in session.execute(said)
        ]
    return pa.Table.from_pylist(rows, schema=SKIPS_SCHEMA)


def adjudication_table(database: Database) -> pa.Table:
    """Return WORDS_SCHEMA: every word of an admin; the last one of a pair counts."""
    said = select(Adjudication, Item.pair_id, User.name).join(Item, Adjudication.item_id == Item.id).join(User, Adjudication.user_id == User.id)
    with database.read() as session:
        found = list(session.execute(said.order_by(Adjudication.id)))
    last = {pair_id: row.id for row, pair_id, _ in found}
    rows = [
        {
            "pair_id": pair_id,
            "admin": name,
            "counts": last[pair_id] == row.id,
            "verdict": row.verdict,
            "rationale": row.rationale,
            "created_at": row.created_at,
        }
        for row, pair_id, name in found
    ]
    return pa.Table.from_pylist(rows, schema=WORDS_SCHEMA)


def _most(original: str | None, values: list[str | None]) -> str | None:
    counts = Counter(_plain(value) for value in values)
    most = max(counts.values())
    winners = [value for value in counts if counts[value] == most]
    return winners[0] if len(winners) == 1 and winners[0] != _plain(original) else original


def _plain(value: str | None) -> str | None:
    """Return a text as a form gives it back when nobody touched it."""
    return (value or "").replace("\r\n", "\n").strip() or None


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
