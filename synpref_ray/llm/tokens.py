"""Prompts to token ids, so that no text of a pair ever becomes a control token. Serves the engines that tokenise themselves.

Our choice: the chat template is tokenised around the prompt, never through it. A tokenizer reads added tokens ("<|im_end|>", "<think>", …)
out of plain text wherever they stand; here each such string is cut after its first character, so it is encoded as ordinary text, while the
template's own stay whole. The template's text is tokenised as it stands (`add_special_tokens=False`): it writes its own BOS, once.

Our choice: a prompt is one user message, with no system message of ours; what the template inserts itself stays, so that templates without a
system role (Gemma) work. White space around the prompt is what the template makes of it: where it trims a user message (Gemma, Llama 3), the
prompt is stripped likewise, elsewhere (Qwen3) it is kept; the start of a reply is never touched.
Our choice: one prompt has the same ids on any day. Templates that print today's date (Llama 3.2) get a fixed one; otherwise a resumed run would
ask other questions than those in its journal, and every midnight would empty the prefix cache.
Our choice: the reply begins where the model's final answer would. Templates that know `enable_thinking` (Qwen3) get it as false, and close an
empty thinking block before the reply; one that leaves its block open all the same is refused, since a verdict in there would be a thought.
"""

import datetime
import itertools
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from synpref_ray.errors import InputError
from synpref_ray.llm.engine import Request

PINNED_DATE = datetime.date(2024, 7, 26)  # the date that Llama 3's templates print when they are given none; reward models read the same

_SLOT = "SYNPREF-USER-MESSAGE-SLOT"
_BEFORE, _AFTER = " \n", "\n "  # white space around the slot, to see what a template does with it
_SUGGESTION = "set use_chat_template=false for this model"


class _Chat(NamedTuple):
    """The ids of a template before and after the user message, and which of the message's ends it strips of white space."""

    before: list[int]
    after: list[int]
    strips_start: bool
    strips_end: bool


class PlainEncoder:
    """Tokenises requests with one Hugging Face tokenizer, which nobody else may use; several threads may call it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer that two threads use at once raises "Already borrowed"
        # A run of white space may be an added token too (Gemma); it controls nothing, and cutting it would only change how text reads.
        control = {token: number for token, number in tokenizer.get_added_vocab().items() if len(token) > 1 and not _is_space(token)}
        self._control = first_letters(control)
        self._control_ids = frozenset(control.values())
        self._completion_start: list[int] = list(tokenizer("", add_special_tokens=True)["input_ids"])
        self._chat: _Chat | None = None

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text` as plain data, white space included: no id of an added token is among them, but for runs of white space."""
        cuts = [0, *(match.end() for match in self._control.finditer(text)), len(text)]
        pieces = (text[start:end] for start, end in itertools.pairwise(cuts))
        return [token for piece in pieces for token in self._plain_ids(piece)]

    def encode_request(self, request: Request) -> list[int]:
        """Return the ids of the whole prompt: template or start token, prompt, the start of the reply.

        Raises:
            InputError: a chat is asked of a tokenizer without a template, or its template cannot carry one user message and a reply's start.
        """
        if not request.chat:
            return [*self._completion_start, *self.encode_text(request.prompt + request.reply_start)]
        chat = self._template()
        prompt = request.prompt.lstrip() if chat.strips_start else request.prompt
        prompt = prompt.rstrip() if chat.strips_end else prompt
        return [*chat.before, *self.encode_text(prompt), *chat.after, *self.encode_text(request.reply_start)]

    def _plain_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The tokenizer's normaliser made a control string of other letters (the Kelvin sign is a K to NFC): no letter alone can be one.
        return [token for letter in text for token in self._ids(letter)]

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _template(self) -> _Chat:
        if self._chat is None:
            if not self._tokenizer.chat_template:
                raise InputError(f"the model's tokenizer has no chat template: {_SUGGESTION}")
            before, after = self._sides(_SLOT)
            if after.rfind("<think>") > after.rfind("</think>"):
                raise InputError(
                    f"the model's chat template opens a thinking block that enable_thinking=false does not close: {_SUGGESTION}, or use another one"
                )
            padded_before, padded_after = self._sides(f"{_BEFORE}{_SLOT}{_AFTER}")
            if padded_before not in (before, before + _BEFORE) or padded_after not in (after, _AFTER + after):
                raise InputError(f"the model's chat template changes a user message in more than the white space around it: {_SUGGESTION}")
            self._chat = _Chat(self._ids(before), self._ids(after), padded_before == before, padded_after == after)
        return self._chat

    def _sides(self, message: str) -> tuple[str, str]:
        """Return what the template writes before and after the slot in a user message, up to where the answer begins."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string=PINNED_DATE.strftime("%d %b %Y"),
            strftime_now=PINNED_DATE.strftime,
        )
        before, found, after = text.partition(_SLOT)
        if not found or _SLOT in after:
            raise InputError(f"the model's chat template does not repeat a user message exactly once: {_SUGGESTION}")
        return before, after


def first_letters(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the first letter of every place where one of `strings` (at least two letters each) stands, overlapping ones too.

    Our choice: a tree of shared beginnings, whose cost per letter of the text does not grow with the number of strings. With Gemma's 6,206 tokens one
    flat list of alternatives took 12 µs a letter, this takes 0.01 (2-core VM, 2026-11-22).
    """
    tree: dict[str, Any] = {}
    for string in strings:
        node = tree
        for letter in string:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile("|".join(f"{re.escape(first)}(?={_rest(node)})" for first, node in tree.items()) or r"(?!)")


def _rest(node: Mapping[str, Any]) -> str:
    if "" in node:  # a string ends here: longer ones with this beginning stand nowhere else
        return ""
    ways = [re.escape(letter) + _rest(after) for letter, after in node.items()]
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"


def _is_space(token: str) -> bool:
    return token.replace("\u2581", " ").isspace()  # SentencePiece writes a space as U+2581
