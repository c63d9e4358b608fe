"""Values of published rows, by path and by the way they are written: plain text, chats with other names, transcripts, JSON inside text.

Our choice: nothing is guessed. A catalogue row says which form a column has; a value that is not of that form is refused with a reason. Only what a
form itself adds (role markers, white space around a transcript's turns, other names of roles and keys) is taken away; texts stay as they are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

from synpref_ray.config import Settings
from synpref_ray.schema import DropReason, Role

Value = object
Turns = list[dict[str, str]]

BLANK_LINE = "\n\n"
_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # as published with Anthropic/hh-rlhf
_STEERLM_MARKER = re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)(?:\n|$)")  # as published with nvidia/HelpSteer2
_MARKED_ROLES = {"Human": Role.USER.value, "Assistant": Role.ASSISTANT.value}
_ROLES = {
    **{role.value: role.value for role in Role},
    "human": Role.USER.value,
    "prompter": Role.USER.value,
    "gpt": Role.ASSISTANT.value,
    "bot": Role.ASSISTANT.value,
    "model": Role.ASSISTANT.value,
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")


class TextForm(StrEnum):
    """How a column writes a conversation or a reply."""

    PLAIN = "plain"
    """Text, or a list of role/content messages: what the structural filter reads."""
    CHAT = "chat"
    """A message or a list of messages with other names: from/value, role/text, human/gpt, or content as a list of text parts."""
    TRANSCRIPT = "transcript"
    """One text with the markers `Human:` and `Assistant:`, each after a blank line."""
    STEERLM = "steerlm"
    """One text whose turns after the first begin with a line `<extra_id_1>User` or `<extra_id_1>Assistant`; without such a line it is plain text."""
    JSON = "json"
    """JSON inside text, or a value that is not text: messages (read as `chat`) or a text."""
    JSON_TURNS = "json_turns"
    """A list of texts, often as JSON inside text: the turns of one speaker in order. Only a comparison knows what to do with them."""


class PromptFields(Settings):
    """The columns that make up a prompt."""

    fields: tuple[str, ...] = ("prompt",)
    """Paths; several texts are joined by a blank line, absent or blank ones are left out. One path may hold a message list."""
    closing: str = ""
    """A line of the format's own, after the last field."""
    system: str = ""
    """Path of a system message; absent or blank means none."""
    form: TextForm = TextForm.PLAIN
    """How a prompt is written, where one path holds it."""


def dig(row: Value, path: str) -> Value:
    """Return the value at a dotted path (keys of mappings, places in lists), None where it leads nowhere; a key with dots goes first."""
    return _follow(row, path, None)


def has_path(row: Value, path: str) -> bool:
    """Whether a dotted path leads to a value, be it null."""
    return _follow(row, path, _NOWHERE) is not _NOWHERE


_NOWHERE = object()


def _follow(row: Value, path: str, nowhere: Value) -> Value:
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step, nowhere)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return nowhere
    return value


def is_blank(value: Value) -> bool:
    """Whether a value is absent or white space alone."""
    return value is None or (isinstance(value, str) and not value.strip())


def read_form(value: Value, form: TextForm) -> Value | DropReason:
    """Return a column's value as the structural filter reads it (text, messages, or None), or why it cannot be read."""
    if value is None or form is TextForm.PLAIN:
        return value
    if form is TextForm.TRANSCRIPT:
        return read_transcript(value)
    if form is TextForm.STEERLM:
        return read_steerlm(value)
    if form is TextForm.JSON:
        value = read_json(value)
        if isinstance(value, DropReason | str):
            return value
    return read_chat(value)


def read_transcript(value: Value) -> Turns | DropReason:
    """Split `\\n\\nHuman: …\\n\\nAssistant: …` into messages, white space around each turn taken away."""
    if not isinstance(value, str):
        return DropReason.WRONG_TYPE
    parts = _MARKER.split(value)
    if parts[0].strip():
        return DropReason.BAD_ROLE_ORDER
    turns = [{"role": _MARKED_ROLES[mark], "content": text.strip()} for mark, text in zip(parts[1::2], parts[2::2], strict=True)]
    return turns or DropReason.EMPTY_PROMPT


def read_steerlm(value: Value) -> Value | DropReason:
    """Split the text of HelpSteer's prompts into messages, the first a user's unless it says otherwise; text without markers stays text."""
    if not isinstance(value, str):
        return DropReason.WRONG_TYPE
    parts = _STEERLM_MARKER.split(value)
    if len(parts) == 1:
        return value
    opening = [{"role": Role.USER.value, "content": parts[0]}] if parts[0].strip() else []
    return opening + [{"role": mark.lower(), "content": text} for mark, text in zip(parts[1::2], parts[2::2], strict=True)]


def read_chat(value: Value) -> Turns | DropReason:
    """Read messages whose keys, role names or content are written another way; a single message counts as a list of one."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return DropReason.WRONG_TYPE
    turns = []
    for message in value:
        if not isinstance(message, Mapping):
            return DropReason.WRONG_TYPE
        role = next((message[key] for key in _ROLE_KEYS if message.get(key) is not None), None)
        content = next((message[key] for key in _CONTENT_KEYS if message.get(key) is not None), "")
        if not isinstance(role, str):
            return DropReason.WRONG_TYPE
        text = _read_content(content)
        if isinstance(text, DropReason):
            return text
        turns.append({"role": _ROLES.get(role.casefold(), role), "content": text})
    return turns


def _read_content(content: Value) -> str | DropReason:
    """Read a message's content: text, or a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return DropReason.WRONG_TYPE
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            return DropReason.WRONG_TYPE
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            return DropReason.UNSUPPORTED_CONTENT
        texts.append(part["text"])
    return "".join(texts)


def read_json(value: Value) -> Value | DropReason:
    """Read JSON that stands inside a text; a value that is no text is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        inner: Value = json.loads(value)
    except (ValueError, RecursionError):
        return DropReason.INVALID_JSON
    return inner


def read_turn_texts(value: Value) -> list[str] | DropReason:
    """Read the texts of one speaker's turns: a list, or JSON of one; a null turn counts as empty."""
    value = read_json(value)
    if isinstance(value, DropReason):
        return value
    if value is None:
        return DropReason.MISSING_FIELD
    if not isinstance(value, list | tuple) or not all(text is None or isinstance(text, str) for text in value):
        return DropReason.WRONG_TYPE
    return [text or "" for text in value]


def read_prompt(row: Value, fields: PromptFields) -> Value | DropReason:
    """Put a prompt together: text, messages, or None when no field is there.

    Our choice: a transcript's last marker with nothing after it opens the reply that another column holds, and is no turn.
    """
    values = [dig(row, path) for path in fields.fields]
    if len(values) == 1:
        prompt = read_form(values[0], fields.form)
        marked = fields.form in (TextForm.TRANSCRIPT, TextForm.STEERLM)
        if marked and isinstance(prompt, list) and prompt[-1] == {"role": Role.ASSISTANT.value, "content": ""}:
            prompt = prompt[:-1]
    else:
        prompt = _join([value for value in values if not is_blank(value)])
    if prompt is None or isinstance(prompt, DropReason):
        return prompt
    if fields.closing and isinstance(prompt, str):
        prompt = prompt + BLANK_LINE + fields.closing
    return _with_system(prompt, dig(row, fields.system)) if fields.system else prompt


def _join(texts: list[Value]) -> str | DropReason | None:
    if not texts:
        return None
    if not all(isinstance(text, str) for text in texts):
        return DropReason.WRONG_TYPE
    return BLANK_LINE.join(str(text) for text in texts)


def _with_system(prompt: Value, system: Value) -> Value | DropReason:
    if is_blank(system):
        return prompt
    if not isinstance(system, str):
        return DropReason.WRONG_TYPE
    opening = [{"role": Role.SYSTEM.value, "content": system}]
    if isinstance(prompt, str):
        return [*opening, {"role": Role.USER.value, "content": prompt}]
    return [*opening, *prompt] if isinstance(prompt, list | tuple) else DropReason.WRONG_TYPE


def read_number(value: Value) -> float | None:
    """Return a finite number (text that spells one too, as UltraFeedback's ratings do), else None."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float):
        number = float(value) if abs(value) < 1e300 else float("inf")
    elif isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return None
    else:
        return None
    return number if abs(number) < float("inf") else None
