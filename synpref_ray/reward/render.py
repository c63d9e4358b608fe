"""From conversations to token ids: what exactly a reward model reads. Serves training, scoring and evaluation alike.

Paper: model card: `apply_chat_template` over the prompt and the reply, no system prompt of our own, no doubled BOS.
Our choice: the template's text is tokenised as it stands (`add_special_tokens=False`, the documented rule for chat templates: they hold
every special token), and a BOS that still comes twice is dropped once. Removing the BOS *string* first, as the model card does for Llama,
would break tokenizers that do not add it again (SmolLM2: BOS is `<|im_start|>`). Templates that print today's date get a fixed one.
"""

import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jinja2 import TemplateError

from synpref_ray.errors import InputError, SchemaError
from synpref_ray.schema import DropReason, Message, Role, canonical_json

logger = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

RENDER_VERSION = 1
PINNED_DATE = datetime.date(2024, 7, 26)  # the date that Llama 3.1's template prints when it is given none
PAIR_COLUMNS = ("pair_id", "prompt", "chosen", "rejected")


@dataclass(frozen=True)
class RenderedPairs:
    """The token ids of P pairs, as flat arrays (cheap to ship between processes and to index).

    `tokens[offsets[2 * i] : offsets[2 * i + 1]]` is the whole conversation of pair i with its chosen reply, the next slice the one with its
    rejected reply. A pair with a `drop_reason` has two empty slices.
    """

    pair_ids: tuple[str, ...]
    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    drop_reasons: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.pair_ids)

    def sequences(self, pair: int) -> tuple[Tokens, Tokens]:
        """Return the token ids of a pair: (with the chosen reply, with the rejected reply)."""
        start, middle, end = (int(offset) for offset in self.offsets[2 * pair : 2 * pair + 3])
        return self.tokens[start:middle], self.tokens[middle:end]

    def usable(self) -> list[int]:
        """Return the indices of the pairs without a drop reason."""
        return [i for i, reason in enumerate(self.drop_reasons) if reason is None]


def render_conversation(tokenizer: Any, prompt: Sequence[Message], reply: str) -> list[int]:
    """Return the token ids of the whole conversation, reply included, as the model's own chat template writes it.

    Raises:
        InputError: the tokenizer has no chat template.
        jinja2.TemplateError: the template refuses this conversation.
    """
    return _tokenise(tokenizer, [_template_text(tokenizer, prompt, reply)])[0]


def render_pairs(tokenizer: Any, pairs: pa.Table, max_length_tokens: int) -> RenderedPairs:
    """Tokenise every pair of a table that has the columns pair_id, prompt, chosen and rejected.

    A pair whose longer conversation exceeds `max_length_tokens` is marked too_long (never cut); one that the chat template refuses is
    marked bad_role_order.
    """
    if missing := [name for name in PAIR_COLUMNS if name not in pairs.column_names]:
        raise SchemaError(f"reward: expected the columns {', '.join(PAIR_COLUMNS)}; missing: {', '.join(missing)}")
    texts: list[str] = []
    reasons: list[str | None] = []
    for row in pairs.select(list(PAIR_COLUMNS)).to_pylist():
        try:
            texts += [_template_text(tokenizer, row["prompt"], row["chosen"]), _template_text(tokenizer, row["prompt"], row["rejected"])]
            reasons.append(None)
        except TemplateError:
            texts += ["", ""]
            reasons.append(DropReason.BAD_ROLE_ORDER.value)
    sequences = _tokenise(tokenizer, texts)
    for i, reason in enumerate(reasons):
        too_long = max(len(sequences[2 * i]), len(sequences[2 * i + 1])) > max_length_tokens
        if reason is not None or too_long:
            sequences[2 * i] = sequences[2 * i + 1] = []
            reasons[i] = reason or DropReason.TOO_LONG.value
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    parts = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return RenderedPairs(tuple(pairs.column("pair_id").to_pylist()), tokens, offsets, tuple(reasons))


def template_digest(tokenizer: Any) -> str:
    """Return 64 hex digits that change whenever a conversation could become other token ids: template, date, vocabulary, rules."""
    parts = {
        "render_version": RENDER_VERSION,
        "date": PINNED_DATE.isoformat(),
        "template": _chat_template(tokenizer),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"},
        "tokenizer": _tokenizer_rules(tokenizer),
    }
    return hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


def choose_pad_token(tokenizer: Any) -> int:
    """Give the tokenizer a pad token if it has none that can serve, let it pad on the right, and return the token's id.

    Plain transformers finds the last token as the rightmost one that is not the pad token, so a pad token that ends every conversation
    (pad = eos = end of turn is common) would make it read the reward one token early. Such a pad token is replaced by another one.
    Our own code knows padding from lengths and never looks at this id.
    """
    last = render_conversation(tokenizer, [{"role": Role.USER.value, "content": "a"}], "b")[-1]
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    made_for_it = [token for token in added if "pad" in token.lower()]  # Llama 3: <|finetune_right_pad_id|>
    others = [tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token]
    for token in [tokenizer.pad_token, *made_for_it, *others, *added]:
        if token is not None and tokenizer.convert_tokens_to_ids(token) != last:
            if tokenizer.pad_token is not None and token != tokenizer.pad_token:
                logger.warning("pad token %s ends every conversation; padding with %s instead", tokenizer.pad_token, token)
            tokenizer.pad_token, tokenizer.padding_side = token, "right"
            return int(tokenizer.pad_token_id)
    raise InputError("no special token of this tokenizer can serve as padding: each ends every conversation; add a pad token to it")


def _chat_template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; a reward model reads whole conversations")
    return str(template)


def _tokenizer_rules(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    rules = json.loads(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in {"padding", "truncation"}}  # these two change with use


def _template_text(tokenizer: Any, prompt: Sequence[Message], reply: str) -> str:
    messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    messages.append({"role": Role.ASSISTANT.value, "content": reply})
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=_chat_template(tokenizer),
        tokenize=False,
        date_string=PINNED_DATE.strftime("%d %b %Y"),
        strftime_now=PINNED_DATE.strftime,
    )
    return str(text)


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    sequences: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in sequences]
