"""The verification queue: who gets which pair, for how long, and what they said. Every change is one transaction.

Two people never hold the same place: an item has as many places as it needs verdicts, a lease takes one until it runs out, and the transaction that
gives a lease holds the item (SQLite: the only writer; PostgreSQL: `FOR UPDATE SKIP LOCKED`, and a second look after the lock).
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from synpref_ray.human.database import Assignment, Database, Item, NotFound, Refused, State, VerdictRow, record
from synpref_ray.human.protocol import UNDECIDABLE, WITHDRAWN, Given, ProtocolConfig, problems
from synpref_ray.human.statements import (
    COUNTS,
    FREE,
    FREE_UNLOCKED,
    HELD,
    IS_STILL_FREE,
    LAST_DONE,
    LAST_VERDICT,
    OF_ITEM_AND_USER,
    SETTLED_BY,
    TAKEN,
)

_CLOSED = "This pair is answered or skipped already: nothing was stored twice."


@dataclass(frozen=True)
class NewItem:
    """A pair for the queue. `rank` orders it (smallest first), `required` is how many people judge it, `selected_by` says why it is here."""

    pair_id: str
    pool: str
    prompt: Sequence[dict[str, str]]
    chosen: str
    rejected: str
    rank: int
    selected_by: str
    required: int = 1
    attributes: dict[str, str | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Lacking(Refused):
    """A verdict does not come with what the protocol asks for; `problems` says what is missing, a sentence each."""

    status = 422

    def __init__(self, found: Sequence[str]):
        super().__init__(" ".join(found))
        self.problems = list(found)


@dataclass(frozen=True)
class Task:
    """What the holder of an assignment sees. It does not say which reply was chosen at the source; `replies` stand in their order."""

    assignment_id: int
    revision: int
    leased_until: float
    prompt: list[dict[str, str]]
    replies: tuple[str, str]
    notes: tuple[str, str]
    attributes: dict[str, str | None]
    tagged_category: str | None  # the pair's own, whatever this person made of it
    earlier: dict[str, Any]  # what this person said before an undo


@dataclass(frozen=True)
class Progress:
    """A person's own count, and how much of the queue waits for them."""

    done: int
    skipped: int
    open_to_them: int
    last: tuple[int, int] | None = None
    """The assignment of their last verdict and its revision: what an undo must name."""
    held: int | None = None
    """The assignment that they hold now."""


class AnnotationQueue:
    """Leases pairs and takes verdicts."""

    def __init__(self, database: Database, config: ProtocolConfig):
        self._db = database
        self._config = config

    def add(self, items: Sequence[NewItem]) -> int:
        """Put pairs into the queue that are not there yet; return how many were new."""
        with self._db.write() as session:
            known: set[str] = set()
            ids = [item.pair_id for item in items]
            for start in range(0, len(ids), 500):
                known |= set(session.scalars(select(Item.pair_id).where(Item.pair_id.in_(ids[start : start + 500]))))
            new = {item.pair_id: item for item in items if item.pair_id not in known}
            for item in new.values():
                content = {"prompt": list(item.prompt), "chosen": item.chosen, "rejected": item.rejected}
                row = Item(pair_id=item.pair_id, pool=item.pool, content=content, attributes=item.attributes, notes=item.notes, complete=False)
                row.selected_by, row.rank, row.required = item.selected_by, item.rank, item.required
                session.add(row)
            return len(new)

    def lease_next(self, user_id: int) -> int | None:
        """Return the assignment that this person holds, or a new one; None: nothing is left for them now."""
        with self._db.write() as session:
            found = self._lease(session, user_id)
            return self._lease(session, user_id, wait=True) if found is None and self._db.has_many_writers else found

    def open(self, user_id: int, assignment_id: int) -> Task:
        """Return what the page shows.

        Raises:
            Refused: the assignment is not this person's, is answered, or its lease ran out and somebody else has the place.
        """
        with self._db.read() as session:
            assignment = self._own(session, user_id, assignment_id)
            if assignment.state != State.LEASED.value or assignment.leased_until > self._db.clock():
                return _task(session, assignment)
        self.renew(user_id, assignment_id)
        with self._db.read() as session:
            return _task(session, self._own(session, user_id, assignment_id))

    def answer(self, user_id: int, assignment_id: int, revision: int, given: Given) -> int | None:
        """Store a verdict and lease the next pair; return its assignment, None if there is none to be had without waiting (`lease_next` waits).

        Args:
            revision: the assignment's when the form was made; a form that was sent before is refused by it.

        Raises:
            Refused: the assignment is not this person's, is answered already, or its lease ran out and somebody else has the place.
            Lacking: the protocol asks for more.
        """
        with self._db.write() as session:
            assignment, item, now = self._held(session, user_id, assignment_id)
            if assignment.revision != revision:
                raise Refused("This form was sent before: nothing was stored twice.")
            lacking = problems(given, self._config, item.attributes.get("task_category"))
            if lacking:
                raise Lacking(lacking)
            assignment.revision += 1
            assignment.state, assignment.closed_at = State.DONE.value, now
            verdict = given.verdict(swapped=assignment.swapped)
            row = VerdictRow(assignment_id=assignment.id, revision=assignment.revision, verdict=verdict, created_at=now)
            row.strength, row.rationale = given.strength, given.rationale.strip()
            row.evidence, row.attributes = given.evidence, {**item.attributes, **given.attributes}
            row.seconds, row.focus_seconds = now - assignment.opened_at, given.focus_seconds
            session.add(row)
            record(session, at=now, user_id=user_id, action="verdict", subject=item.pair_id, verdict=verdict, revision=assignment.revision)
            recount(session, item)
            return self._lease(session, user_id)

    def skip(self, user_id: int, assignment_id: int, reason: str) -> int | None:
        """Give a pair back for good, with a reason; return the next assignment."""
        if not reason.strip() or len(reason) > 500 or "\x00" in reason:
            raise Refused("Say in a few words why you skip this pair.")
        with self._db.write() as session:
            assignment, item, now = self._held(session, user_id, assignment_id)
            assignment.state, assignment.closed_at = State.SKIPPED.value, now
            record(session, at=now, user_id=user_id, action="skip", subject=item.pair_id, reason=reason.strip())
            session.flush()
            return self._lease(session, user_id)

    def undo(self, user_id: int, assignment_id: int, revision: int) -> int:
        """Take this person's last verdict back and give them the pair again; the log keeps both. Return the assignment.

        Raises:
            Refused: the assignment in this revision is not their last verdict: another page undid it, or said more since.
        """
        of_user = {"user_id": user_id}
        with self._db.write() as session:
            found = session.scalars(LAST_DONE, of_user).first()
            if found is None:
                raise Refused("There is no verdict of yours to undo.")
            item = session.get_one(Item, found.item_id, with_for_update=True)  # always the item first: two orders could wait for each other
            last = session.scalars(LAST_DONE.with_for_update().execution_options(populate_existing=True), of_user).first()
            if last is None or (last.id, last.revision, last.item_id) != (assignment_id, revision, item.id):
                raise Refused("That is no longer your last verdict: nothing was undone.")
            now = self._db.clock()
            last.revision += 1
            last.state, last.closed_at = State.LEASED.value, None
            last.opened_at, last.leased_until = now, now + self._lease_seconds
            nothing: dict[str, Any] = {}
            row = VerdictRow(assignment_id=last.id, revision=last.revision, verdict=WITHDRAWN, strength=0, rationale="", created_at=now)
            row.evidence, row.attributes, row.seconds, row.focus_seconds = nothing, nothing, 0.0, 0.0
            session.add(row)
            recount(session, item)
            record(session, at=now, user_id=user_id, action="undo", subject=item.pair_id, revision=last.revision)
            return last.id

    def renew(self, user_id: int, assignment_id: int) -> float:
        """Prolong a lease; return its new end. One that ran out is given again if its place is still free."""
        with self._db.write() as session:
            assignment, _, now = self._held(session, user_id, assignment_id)
            assignment.leased_until = now + self._lease_seconds
            return assignment.leased_until

    def progress(self, user_id: int) -> Progress:
        """Count this person's work."""
        with self._db.read() as session:
            found = session.execute(COUNTS, {"user_id": user_id, "now": self._db.clock()}).one()
            last = session.execute(LAST_VERDICT, {"user_id": user_id}).first() if found.done else None
            return Progress(found.done, found.skipped, found.waiting - found.finished, None if last is None else (last.id, last.revision), found.held)

    @property
    def _lease_seconds(self) -> float:
        return 60 * self._config.lease_minutes

    def _own(self, session: Session, user_id: int, assignment_id: int, *, lock: bool = False) -> Assignment:
        known, lock = 0 < assignment_id < 2**31, lock and self._db.has_many_writers
        found = session.get(Assignment, assignment_id, with_for_update=True if lock else None, populate_existing=lock) if known else None
        if found is None or found.user_id != user_id:
            raise NotFound("There is no such pair in your hands.")
        return found

    def _held(self, session: Session, user_id: int, assignment_id: int) -> tuple[Assignment, Item, float]:
        """Lock an assignment that this person holds, and its item before it; return both, and the time now that they are locked.

        A lease that ran out still holds if nobody took the place: what the person typed meanwhile is not lost.
        """
        item = session.get_one(Item, self._own(session, user_id, assignment_id).item_id, with_for_update=True)
        assignment = self._own(session, user_id, assignment_id, lock=True)
        now = self._db.clock()
        if assignment.state != State.LEASED.value:
            raise Refused(_CLOSED)
        if assignment.leased_until <= now:
            if item.complete or (session.scalar(TAKEN, {"item_id": item.id, "now": now}) or 0) >= item.required:
                raise Refused("Your time for this pair ran out, and somebody else has it now: nothing was stored.")
            assignment.leased_until = now + self._lease_seconds
        return assignment, item, now

    def _lease(self, session: Session, user_id: int, *, wait: bool = False) -> int | None:
        """Give a place to a person. `wait`: also look at items that others hold locked this moment (PostgreSQL); only where no lock is held yet."""
        of_user = {"user_id": user_id, "now": self._db.clock()}
        mine = session.scalar(HELD, of_user)
        if mine is not None:
            return mine
        full: list[int] = []
        free = FREE if wait else FREE_UNLOCKED
        while (item_id := session.scalar(free.where(Item.id.not_in(full)) if full else free, of_user)) is not None:
            if wait:
                session.execute(select(Item.id).where(Item.id == item_id).with_for_update())
            if not self._db.has_many_writers or session.scalar(IS_STILL_FREE, {**of_user, "item_id": item_id}) is not None:
                return self._give(session, user_id, item_id)
            full.append(item_id)  # PostgreSQL: taken, settled, or answered by this person in another window, between the look and the lock
        return None

    def _give(self, session: Session, user_id: int, item_id: int) -> int:
        now = self._db.clock()
        assignment = session.scalar(OF_ITEM_AND_USER, {"item_id": item_id, "user_id": user_id})
        if assignment is None:
            # Drawn, not computed: a pair's id is a hash of its texts, so an order that follows from it would tell which reply is the chosen one.
            assignment = Assignment(item_id=item_id, user_id=user_id, revision=0, swapped=bool(secrets.randbits(1)))
            session.add(assignment)
        assignment.state, assignment.closed_at = State.LEASED.value, None
        assignment.opened_at, assignment.leased_until = now, now + self._lease_seconds
        session.flush()
        return assignment.id


def recount(session: Session, item: Item) -> None:
    """Say anew whether an item is complete: it has its verdicts, or an admin's word, which stands whatever is undone later."""
    session.flush()
    num_done, has_word = session.execute(SETTLED_BY, {"item_id": item.id}).one()
    item.complete = bool(has_word) or num_done >= item.required
    session.flush()


def _task(session: Session, assignment: Assignment) -> Task:
    if assignment.state != State.LEASED.value:
        raise Refused(_CLOSED)
    item = session.get_one(Item, assignment.item_id)
    said = select(VerdictRow).where(VerdictRow.assignment_id == assignment.id, VerdictRow.verdict != WITHDRAWN)
    before = session.scalars(said.order_by(VerdictRow.revision.desc()).limit(1)).first() if assignment.revision else None
    replies = (item.content["chosen"], item.content["rejected"])
    notes = (item.notes.get("chosen", ""), item.notes.get("rejected", ""))
    return Task(
        assignment_id=assignment.id,
        revision=assignment.revision,
        leased_until=assignment.leased_until,
        prompt=item.content["prompt"],
        replies=replies[::-1] if assignment.swapped else replies,
        notes=notes[::-1] if assignment.swapped else notes,
        attributes=before.attributes if before else item.attributes,
        tagged_category=item.attributes.get("task_category"),
        earlier=_earlier(before, assignment.swapped) if before else {},
    )


def _earlier(row: VerdictRow, swapped: bool) -> dict[str, Any]:
    first, second = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    choice = {first: "1", second: "2"}.get(row.verdict, row.verdict)
    return {"choice": choice, "strength": row.strength, "rationale": row.rationale, **row.evidence, "own_judgement": row.verdict != UNDECIDABLE}
