"""The structural filter: a row of any accepted form becomes prompt, chosen and rejected, or is refused with exactly one reason.

Paper: Sec. 3 assumes clean pairs and says nothing of the formats. Our choice, all of it:

- `prompt` is a string (one user turn) or messages; `chosen` and `rejected` are strings, messages that continue the prompt, or whole
  conversations (TRL, RLHFlow). A whole conversation beside a `prompt` must contain that prompt at its start or right before the reply.
- The two conversations must be equal up to exactly one final assistant message each, else the row is `diverging_turns`; what they share is
  the prompt.
- A prompt is an optional system message, then user and assistant in turn, and ends with user. No turn may be empty, the system's included;
  white space alone is empty.
- Text is never stripped, repaired or guessed at: JSON inside a string stays a string. Only `role` and `content` of a message are read.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from synpref_ray.schema import DropReason, Role

Turn = tuple[str, str]  # role, content


class StructuredPair(NamedTuple):
    """A row that passed the filter."""

    prompt: Sequence[Turn]
    chosen: str
    rejected: str


def structure_pair(prompt: object, chosen: object, rejected: object) -> StructuredPair | DropReason:
    """Read one row's three values, None where absent, as a pair, or say why it is none."""
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return _check_pair([(Role.USER.value, prompt)], chosen, rejected)
    if chosen is None or rejected is None:
        return DropReason.MISSING_FIELD
    if prompt is None and not (_is_list(chosen) and _is_list(rejected)):
        return DropReason.WRONG_TYPE if _is_unreadable(chosen) or _is_unreadable(rejected) else DropReason.MISSING_FIELD
    opening = _read_turns(prompt, Role.USER) if prompt is not None else []
    if isinstance(opening, DropReason):
        return opening
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _check_pair(opening, chosen, rejected)
    chosen_turns = _read_conversation(opening, chosen)
    if isinstance(chosen_turns, DropReason):
        return chosen_turns
    rejected_turns = _read_conversation(opening, rejected)
    if isinstance(rejected_turns, DropReason):
        return rejected_turns
    return _split_last_turn(chosen_turns, rejected_turns)


def _split_last_turn(chosen: list[Turn], rejected: list[Turn]) -> StructuredPair | DropReason:
    if chosen[-1][0] != Role.ASSISTANT or rejected[-1][0] != Role.ASSISTANT:
        return DropReason.BAD_ROLE_ORDER
    if chosen[:-1] != rejected[:-1]:
        return DropReason.DIVERGING_TURNS
    return _check_pair(chosen[:-1], chosen[-1][1], rejected[-1][1])


def _check_pair(prompt: list[Turn], chosen: str, rejected: str) -> StructuredPair | DropReason:
    if not prompt or any(_is_blank(content) for _, content in prompt):
        return DropReason.EMPTY_PROMPT
    if len(prompt) > 1 or prompt[0][0] != Role.USER:
        turns = prompt[1:] if prompt[0][0] == Role.SYSTEM else prompt
        expected = (Role.USER, Role.ASSISTANT)
        if len(turns) % 2 == 0 or any(role != expected[place % 2] for place, (role, _) in enumerate(turns)):
            return DropReason.BAD_ROLE_ORDER
    if _is_blank(chosen) or _is_blank(rejected):
        return DropReason.EMPTY_REPLY
    if chosen == rejected:
        return DropReason.IDENTICAL_REPLIES
    return StructuredPair(prompt, chosen, rejected)


def _read_turns(value: object, role: Role) -> list[Turn] | DropReason:
    """Read a string as one turn of `role`, a message list as it is; a message without content counts as empty."""
    if isinstance(value, str):
        return [(role.value, value)]
    if not isinstance(value, (list, tuple)):
        return DropReason.WRONG_TYPE
    turns: list[Turn] = []
    for message in value:
        if not isinstance(message, Mapping):
            return DropReason.WRONG_TYPE
        speaker, content = message.get("role"), message.get("content")
        if not isinstance(speaker, str) or not (content is None or isinstance(content, str)):
            return DropReason.WRONG_TYPE
        turns.append((speaker, content or ""))
    return turns


def _read_conversation(opening: list[Turn], reply: object) -> list[Turn] | DropReason:
    """Return the whole conversation that a reply value stands for."""
    turns = _read_turns(reply, Role.ASSISTANT)
    if isinstance(turns, DropReason):
        return turns
    if not turns:
        return DropReason.EMPTY_REPLY
    if turns[0][0] == Role.ASSISTANT:
        return opening + turns
    shared = turns[:-1]
    if opening and shared[: len(opening)] != opening and shared[-len(opening) :] != opening:
        return DropReason.DIVERGING_TURNS
    return turns


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_unreadable(value: object) -> bool:
    return not isinstance(value, (str, list, tuple))


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
