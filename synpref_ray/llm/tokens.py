"""Prompts to token ids, so that no text of a pair ever becomes a control token. Serves the engines that tokenise themselves.

Our choice: the chat template is tokenised around the prompt, never through it. A tokenizer reads added tokens ("<|im_end|>", "<think>", …)
out of plain text wherever they stand; here each such string is cut after its first character, so it is encoded as ordinary text, while the
template's own stay whole.
"""

import itertools
import re
import threading
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.llm.engine import Request

_SLOT = "SYNPREF-USER-MESSAGE-SLOT"


class PlainEncoder:
    """Tokenises requests with one Hugging Face tokenizer, which nobody else may use; several threads may call it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer that two threads use at once raises "Already borrowed"
        # A run of white space may be an added token too (Gemma); it controls nothing, and cutting it would only change how text reads.
        control = sorted((token for token in tokenizer.get_added_vocab() if len(token) > 1 and not token.isspace()), key=len, reverse=True)
        self._control = re.compile(f"(?=({'|'.join(map(re.escape, control))}))" if control else r"(?!)")
        self._completion_start: list[int] = list(tokenizer("", add_special_tokens=True)["input_ids"])
        self._around_chat: tuple[list[int], list[int]] | None = None

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text` as plain data: no id of an added token is among them."""
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        pieces = (text[start:end] for start, end in itertools.pairwise(cuts))
        return [token for piece in pieces for token in self._ids(piece)]

    def encode_request(self, request: Request) -> list[int]:
        """Return the ids of the whole prompt: template or start token, prompt, the start of the reply."""
        before, after = self._chat_sides() if request.chat else (self._completion_start, [])
        if request.chat:
            return [*before, *self.encode_text(request.prompt), *after, *self.encode_text(request.reply_start)]
        return [*before, *self.encode_text(request.prompt + request.reply_start)]

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chat_sides(self) -> tuple[list[int], list[int]]:
        if self._around_chat is None:
            if not self._tokenizer.chat_template:
                raise InputError("the model's tokenizer has no chat template: set use_chat_template=false for this model")
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=True)
            before, found, after = text.partition(_SLOT)
            if not found or _SLOT in after:
                raise InputError("the model's chat template does not repeat a user message exactly once: set use_chat_template=false for this model")
            self._around_chat = (self._ids(before), self._ids(after))
        return self._around_chat
