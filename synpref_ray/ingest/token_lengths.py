"""How many tokens the parts of a pair take, by a tokenizer of the user's choice.

Our choice: contents alone are counted, without a chat template (its few tokens a turn are the model's own), and a text that spells a special token
counts as the letters that it is.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import InputError

TEXTS_AT_ONCE = 512  # ours: a tokenizer's results take some ten times the memory of the texts
FIELDS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
TOKEN_LENGTHS_SCHEMA = pa.schema([pa.field("pair_id", pa.string(), nullable=False), *(pa.field(name, pa.int32(), nullable=False) for name in FIELDS)])


def tokenizer_file(name: str) -> Path:
    """Return the file of a model's tokenizer.

    Raises:
        InputError: the model is not there, or has no fast tokenizer.
    """
    file = Path(resolve_model(name, weights=False)) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"tokenizer {name}: {file.parent} has no tokenizer.json; name a model with a fast tokenizer, or tokenizer= for none")
    return file


def load_tokenizer(file: Path) -> Tokenizer:
    """Return a tokenizer that neither pads nor truncates, and reads special tokens in a text as text."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_lengths(pairs: pa.Table, tokenizer: Tokenizer) -> pa.Table:
    """Return the lengths of P pairs (columns pair_id, prompt, chosen, rejected), same rows and order (TOKEN_LENGTHS_SCHEMA).

    A prompt's length is the sum over its turns.
    """
    prompts = [[message["content"] for message in prompt] for prompt in pairs["prompt"].to_pylist()]
    replies = [pairs[name].to_pylist() for name in ("chosen", "rejected")]
    lengths = _count(dict.fromkeys([*(text for prompt in prompts for text in prompt), *replies[0], *replies[1]]), tokenizer)
    columns = [[sum(lengths[text] for text in prompt) for prompt in prompts], *([lengths[text] for text in texts] for texts in replies)]
    return pa.table([pairs["pair_id"], *(pa.array(column, pa.int32()) for column in columns)], schema=TOKEN_LENGTHS_SCHEMA)


def _count(texts: dict[str, None], tokenizer: Tokenizer) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for part in _batches(list(texts)):
        lengths.update(zip(part, map(len, tokenizer.encode_batch_fast(part, add_special_tokens=False)), strict=True))
    return lengths


def _batches(texts: Sequence[str]) -> list[list[str]]:
    return [list(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)]
