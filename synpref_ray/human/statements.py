"""What the queue asks its database on every request, put together once: SQLAlchemy takes longer to build such a statement than SQLite to answer it.

Parameters: `user_id`, `item_id`, and `now`, in seconds since 1970.
"""

from typing import Any

from sqlalchemy import Float, Integer, and_, bindparam, exists, func, or_, select

from synpref_ray.human.database import Adjudication, Assignment, Item, State

_USER, _ITEM, _NOW = bindparam("user_id", type_=Integer), bindparam("item_id", type_=Integer), bindparam("now", type_=Float)
_IS_LEASED = and_(Assignment.state == State.LEASED.value, Assignment.leased_until > _NOW)


def _num_taken(item_id: Any) -> Any:
    """Count the places of an item that are taken: answered, or leased and not run out."""
    is_taken = or_(Assignment.state == State.DONE.value, _IS_LEASED)
    return select(func.count()).where(Assignment.item_id == item_id, is_taken).correlate(Item).scalar_subquery()


def _num_of_user(*conditions: Any) -> Any:
    return select(func.count()).select_from(Assignment).where(Assignment.user_id == _USER, *conditions).scalar_subquery()


TAKEN = select(_num_taken(_ITEM))
"""How many places of an item are taken."""
SETTLED_BY = select(
    select(func.count()).where(Assignment.item_id == _ITEM, Assignment.state == State.DONE.value).scalar_subquery(),
    exists().where(Adjudication.item_id == _ITEM),
)
"""How many verdicts an item has, and whether it has an admin's word."""
OF_ITEM_AND_USER = select(Assignment).where(Assignment.item_id == _ITEM, Assignment.user_id == _USER)
_IS_USER_S = Assignment.user_id == _USER
HELD = select(Assignment.id).where(_IS_USER_S, _IS_LEASED).order_by(Assignment.opened_at.desc(), Assignment.id.desc()).limit(1)
"""The assignment that a person holds."""
LAST_DONE = (
    select(Assignment).where(_IS_USER_S, Assignment.state == State.DONE.value).order_by(Assignment.closed_at.desc(), Assignment.id.desc()).limit(1)
)
"""The assignment of a person's last verdict."""
LAST_VERDICT = LAST_DONE.with_only_columns(Assignment.id, Assignment.revision)
COUNTS = select(
    _num_of_user(Assignment.state == State.DONE.value).label("done"),
    _num_of_user(Assignment.state == State.SKIPPED.value).label("skipped"),
    select(func.count()).select_from(Item).where(~Item.complete).scalar_subquery().label("waiting"),
    _num_of_user(Assignment.state != State.LEASED.value, Assignment.item_id == Item.id, ~Item.complete).label("finished"),
    HELD.scalar_subquery().label("held"),
)
"""A person's counts; `finished`: pairs that wait for others, and that this person has answered or skipped."""
_CLOSED = Assignment.state.in_([State.DONE.value, State.SKIPPED.value])
_IS_CLOSED_BY_USER = exists().where(Assignment.item_id == Item.id, _IS_USER_S, _CLOSED).correlate(Item)
_IS_FREE = and_(~Item.complete, ~_IS_CLOSED_BY_USER, _num_taken(Item.id) < Item.required)
FREE = select(Item.id).where(_IS_FREE).order_by(Item.rank, Item.id).limit(1)
"""The first item that has a place for a person."""
IS_STILL_FREE = select(Item.id).where(Item.id == _ITEM, _IS_FREE)
"""The item, if it has a place for a person: to look again once it is locked."""
FREE_UNLOCKED = FREE.with_for_update(skip_locked=True, of=Item)
"""The same, locked; items that others hold locked are passed over (PostgreSQL)."""
