"""Label Studio for teams that have it: the queue goes out as tasks with a labelling config, its JSON annotations come back in as verdicts.

Our choice: what comes back is held to the same protocol as our own pages: an annotation without the evidence that its category needs is refused and
counted. Which reply stood first is read from the task's own texts, so no setting that changed meanwhile can turn a verdict round. Annotators
become closed accounts named `ls-` and their number in Label Studio (reserved here): they count in agreement and quality, and cannot sign in here.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from xml.sax.saxutils import quoteattr

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.human.accounts import RESERVED_PREFIX
from synpref_ray.human.assignments import recount
from synpref_ray.human.database import Assignment, Database, Item, LabelStudioTask, Role, State, User, VerdictRow, record
from synpref_ray.human.protocol import UNDECIDABLE, Given, ProtocolConfig, problems
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory

Guideline = Callable[[Mapping[str, str | None]], str]
_CHOICES = {"task_category": TaskCategory, "objectivity": Objectivity, "controversiality": Controversiality}
_TOKEN = re.compile("[0-9a-f]{32}")
_TEXTS = ("desired_attributes", "annotation_guideline")
_STRENGTHS = {"slightly": 1, "clearly": 2, "strongly": 3}


class LabelStudioReport(Settings):
    """What a file of annotations held. `refused` counts by reason; nothing of those was stored."""

    num_annotations: int
    num_new: int
    num_unchanged: int
    refused: dict[str, int]


def labelling_config() -> str:
    """Return the XML to paste into a Label Studio project (Settings, Labeling Interface, Code)."""
    lines = ["<View>", '  <Header value="Guideline"/>', '  <Text name="guideline" value="$guideline"/>', '  <Header value="Conversation"/>']
    lines.append('  <Paragraphs name="conversation" value="$conversation" layout="dialogue" nameKey="role" textKey="content"/>')
    for number in (1, 2):
        lines += [f'  <Header value="Reply {number}"/>', f'  <Text name="reply_{number}" value="$reply_{number}"/>']
    lines += _choices("verdict", "Which reply is better?", ("1", "2", UNDECIDABLE), required=True)
    lines += _choices("strength", "How much better?", tuple(_STRENGTHS))
    lines += _text_area("search_link", "Link of what you found (needed where facts decide)")
    lines += _text_area("code_run", "What you ran, and what came out (needed for code)")
    lines += _text_area("rationale", "Why?")
    lines += _choices("help", "Did an LLM help?", ("An LLM helped me; the judgement is my own",))
    for name, enum in _CHOICES.items():
        lines += _choices(name, f"{name.replace('_', ' ').capitalize()}, if not as the task says", tuple(entry.value for entry in enum))
    for name in _TEXTS:
        lines += _text_area(name, f"{name.replace('_', ' ').capitalize()}, if not as the task says")
    return "\n".join([*lines, "</View>"]) + "\n"


def make_tasks(database: Database, guideline: Guideline) -> list[dict[str, Any]]:
    """Return a task for every pair that is not complete, in the order of the queue.

    Replies stand in an order drawn once per pair, and a token stands for the pair: its id, a hash of its texts, would tell which one is the chosen.
    """
    with database.write() as session:
        items = list(session.scalars(select(Item).where(~Item.complete).order_by(Item.rank, Item.id)))
        known = {task.item_id: task for task in session.scalars(select(LabelStudioTask))}
        for item in items:
            if item.id not in known:
                known[item.id] = LabelStudioTask(token=secrets.token_hex(16), item_id=item.id, swapped=bool(secrets.randbits(1)))
                session.add(known[item.id])
    tasks = []
    for item in items:
        replies = (item.content["chosen"], item.content["rejected"])
        first, second = replies[::-1] if known[item.id].swapped else replies
        data = {"synpref_task": known[item.id].token, "conversation": item.content["prompt"], "reply_1": first, "reply_2": second}
        tags = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in item.attributes.items() if value)
        tasks.append({"data": {**data, "guideline": f"{guideline(item.attributes)}\n\n{tags}".strip(), "wanted": item.required}})
    return tasks


def import_annotations(database: Database, config: ProtocolConfig, text: str) -> LabelStudioReport:
    """Store the annotations of a Label Studio JSON export (not JSON-MIN); reading the same file again changes nothing.

    Raises:
        InputError: the text is not such an export.
    """
    try:
        tasks = json.loads(text)
        found = [(task["data"], annotation) for task in tasks for annotation in task["annotations"] if not annotation.get("was_cancelled")]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError("not a JSON export of Label Studio: expected a list of tasks with data and annotations") from None
    counts: Counter[str] = Counter()
    newest: dict[tuple[int, int], _Said] = {}
    with database.write() as session:
        for data, annotation in found:
            said = _read(session, data, annotation)
            if isinstance(said, str):
                counts[said] += 1
                continue
            key = (said.item.id, said.person)
            if key in newest:
                counts["older than another of the same person"] += 1
            if key not in newest or newest[key].at <= said.at:
                newest[key] = said
        for said in newest.values():
            counts[_store(session, database.clock(), said, config)] += 1
    new, unchanged = counts.pop("new", 0), counts.pop("unchanged", 0)
    return LabelStudioReport(num_annotations=len(found), num_new=new, num_unchanged=unchanged, refused=dict(counts))


@dataclass(frozen=True)
class _Said:
    """An annotation whose pair, person and time are known. `person`: their number in Label Studio; `at`: seconds since 1970."""

    item: Item
    person: int
    at: float
    seconds: float
    data: Mapping[str, Any]
    annotation: Mapping[str, Any]


def _read(session: Session, data: Any, annotation: Mapping[str, Any]) -> "_Said | str":
    """Return what an annotation is about, or why it cannot be told."""
    token = data.get("synpref_task") if isinstance(data, dict) else None
    is_token = isinstance(token, str) and _TOKEN.fullmatch(token)
    known = select(Item).join(LabelStudioTask, LabelStudioTask.item_id == Item.id).where(LabelStudioTask.token == token)
    item = session.scalar(known.with_for_update(of=Item)) if is_token else None
    if item is None:
        return "unknown pair"
    replies = (item.content["chosen"], item.content["rejected"])
    if (data.get("reply_1"), data.get("reply_2")) not in (replies, replies[::-1]):
        return "other replies than the pair's"
    who = annotation.get("completed_by")
    person = who.get("id") if isinstance(who, dict) else who
    if not isinstance(person, int) or isinstance(person, bool) or not 0 < person < 2**63:
        return "nobody is named who made it"
    at = _seconds_of(annotation.get("updated_at") or annotation.get("created_at"))
    if at is None:
        return "no time when it was made"
    taken = annotation.get("lead_time")
    seconds = 0.0 if taken is None else taken
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 1e9:  # JSON may hold NaN, which is not
        return "its lead time is no number of seconds"
    return _Said(item, person, at, float(seconds), data, annotation)


def _seconds_of(text: object) -> float | None:
    """Return a time of Label Studio (ISO 8601; without a zone: UTC) as seconds since 1970."""
    try:
        found = datetime.fromisoformat(text) if isinstance(text, str) else None
        return None if found is None else (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _store(session: Session, now: float, said: _Said, config: ProtocolConfig) -> str:
    """Store one annotation; return `new`, `unchanged` (it is stored already, or one that is newer), or why it was refused."""
    item, annotation = said.item, said.annotation
    swapped = said.data["reply_1"] == item.content["rejected"]
    try:
        given = _given(annotation, item.attributes)
    except (ValidationError, TypeError, KeyError, IndexError, AttributeError):
        return "unreadable"
    lacking = problems(given, config, item.attributes.get("task_category"))
    if lacking:
        return lacking[0]
    user = _user(session, now, said.person)
    assignment = session.scalar(select(Assignment).where(Assignment.item_id == item.id, Assignment.user_id == user.id))
    if assignment is None:
        assignment = Assignment(item_id=item.id, user_id=user.id, revision=0, state=State.DONE.value, swapped=swapped)
        assignment.opened_at = assignment.leased_until = assignment.closed_at = said.at
        session.add(assignment)
        session.flush()
    before = session.scalar(select(VerdictRow).where(VerdictRow.assignment_id == assignment.id, VerdictRow.revision == assignment.revision))
    if before is not None and said.at <= before.created_at:
        return "unchanged"
    row = VerdictRow(assignment_id=assignment.id, revision=assignment.revision + 1, verdict=given.verdict(swapped=swapped), strength=given.strength)
    row.rationale, row.evidence, row.attributes = given.rationale.strip(), given.evidence, {**item.attributes, **given.attributes}
    row.seconds, row.focus_seconds, row.created_at = said.seconds, 0.0, said.at
    assignment.revision, assignment.closed_at = row.revision, said.at
    session.add(row)
    recount(session, item)
    record(session, at=now, user_id=user.id, action="label_studio_verdict", subject=item.pair_id, verdict=row.verdict, revision=row.revision)
    session.flush()
    return "new"


def _given(annotation: Any, tags: Mapping[str, str | None]) -> Given:
    said: dict[str, str] = {}
    for result in annotation["result"]:
        value = result["value"]
        parts = value["choices"] if result["type"] == "choices" else value["text"]
        said[result["from_name"]] = parts if isinstance(parts, str) else "\n".join(parts)
    attributes = {name: said.get(name) or tags.get(name) or "" for name in (*_CHOICES, *_TEXTS)}
    texts = {name: said.get(name, "") for name in ("rationale", "search_link", "code_run")}
    helped = bool(said.get("help"))
    strength = _STRENGTHS.get(said.get("strength", "clearly"), 0)
    values = {"choice": said.get("verdict", ""), "strength": strength, "llm_helped": helped, "own_judgement": helped}
    return Given.model_validate({**values, **texts, **attributes})


def _user(session: Session, now: float, person: int) -> User:
    """Return the closed account of a Label Studio annotator, made if it is not there."""
    name = f"{RESERVED_PREFIX}{person}"
    user = session.scalar(select(User).where(User.name == name))
    if user is None:
        user = User(name=name, role=Role.ANNOTATOR.value, secret_hash=f"!{secrets.token_hex(8)}", active=False, created_at=now)
        session.add(user)
        session.flush()
    return user


def _choices(name: str, header: str, values: Sequence[str], *, required: bool = False) -> list[str]:
    needed = ' required="true"' if required else ""
    choices = "".join(f"<Choice value={quoteattr(value)}/>" for value in values)
    return [
        f'  <Header value={quoteattr(header)} size="5"/>',
        f'  <Choices name="{name}" toName="conversation" choice="single" showInline="true"{needed}>{choices}</Choices>',
    ]


def _text_area(name: str, header: str) -> list[str]:
    return [f'  <Header value={quoteattr(header)} size="5"/>', f'  <TextArea name="{name}" toName="conversation" maxSubmissions="1" rows="2"/>']
