"""Label Studio for teams that have it: the queue goes out as tasks with a labelling config, its JSON annotations come back in as verdicts.

Our choice: what comes back is held to the same protocol as our own pages: an annotation without the evidence that its category needs is refused and
counted. Which reply stood first is read from the task's own texts, so no setting that changed meanwhile can turn a verdict round. Annotators
become closed accounts named `ls-…`: they count in agreement and quality, and cannot sign in here.
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.human.database import Assignment, Database, Item, Role, State, User, VerdictRow, record
from synpref_ray.human.protocol import UNDECIDABLE, Given, ProtocolConfig, is_swapped, problems
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory

Guideline = Callable[[Mapping[str, str | None]], str]
_CHOICES = {"task_category": TaskCategory, "objectivity": Objectivity, "controversiality": Controversiality}
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


def make_tasks(database: Database, config: ProtocolConfig, guideline: Guideline) -> list[dict[str, Any]]:
    """Return a task for every pair that is not complete, in the order of the queue; replies stand in an order drawn per pair."""
    with database.read() as session:
        items = list(session.scalars(select(Item).where(~Item.complete).order_by(Item.rank, Item.id)))
    tasks = []
    for item in items:
        replies = (item.content["chosen"], item.content["rejected"])
        first, second = replies[::-1] if is_swapped(config.seed, item.pair_id, "label_studio") else replies
        data = {"pair_id": item.pair_id, "conversation": item.content["prompt"], "reply_1": first, "reply_2": second}
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
    with database.write() as session:
        for data, annotation in found:
            counts[_store(session, database.clock(), data, annotation, config)] += 1
    new, unchanged = counts.pop("new", 0), counts.pop("unchanged", 0)
    return LabelStudioReport(num_annotations=len(found), num_new=new, num_unchanged=unchanged, refused=dict(counts))


def _store(session: Session, now: float, data: Any, annotation: Any, config: ProtocolConfig) -> str:
    """Store one annotation; return `new`, `unchanged`, or why it was refused."""
    item = session.scalar(select(Item).where(Item.pair_id == str(data.get("pair_id")))) if isinstance(data, dict) else None
    if item is None:
        return "unknown pair"
    replies = (item.content["chosen"], item.content["rejected"])
    if (data.get("reply_1"), data.get("reply_2")) not in (replies, replies[::-1]):
        return "other replies than the pair's"
    swapped = data["reply_1"] == item.content["rejected"]
    try:
        given = _given(annotation, item.attributes)
    except (ValidationError, TypeError, KeyError, IndexError, AttributeError):
        return "unreadable"
    lacking = problems(given, config, item.attributes.get("task_category"))
    if lacking:
        return lacking[0]
    user = _user(session, now, annotation.get("completed_by"))
    assignment = session.scalar(select(Assignment).where(Assignment.item_id == item.id, Assignment.user_id == user.id))
    if assignment is None:
        assignment = Assignment(item_id=item.id, user_id=user.id, revision=0, opened_at=now, leased_until=now, state=State.DONE.value, closed_at=now)
        assignment.swapped = swapped
        session.add(assignment)
        session.flush()
    before = session.scalar(select(VerdictRow).where(VerdictRow.assignment_id == assignment.id, VerdictRow.revision == assignment.revision))
    row = VerdictRow(assignment_id=assignment.id, revision=assignment.revision + 1, verdict=given.verdict(swapped=swapped), strength=given.strength)
    row.rationale, row.evidence, row.attributes = given.rationale.strip(), given.evidence, {**item.attributes, **given.attributes}
    row.seconds, row.focus_seconds, row.created_at = float(annotation.get("lead_time") or 0.0), 0.0, now
    if before is not None and all(
        getattr(before, key) == getattr(row, key) for key in ("verdict", "strength", "rationale", "evidence", "attributes")
    ):
        return "unchanged"
    assignment.revision += 1
    session.add(row)
    session.flush()
    done = select(func.count()).where(Assignment.item_id == item.id, Assignment.state == State.DONE.value)
    item.complete = (session.scalar(done) or 0) >= item.required
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


def _user(session: Session, now: float, who: Any) -> User:
    """Return the closed account of a Label Studio annotator, made if it is not there."""
    known = who.get("email") or who.get("id") if isinstance(who, dict) else who
    name = "ls-" + re.sub(r"[^A-Za-z0-9._@-]", "-", str(known or "unknown"))[:60]
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
