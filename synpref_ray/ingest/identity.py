"""The names of a pair at ingest speed: the ids of `schema.pair_id`, `comparison_id` and `prompt_group`, each text escaped and hashed once.

`schema` defines the ids in the plainest way; on pairs of 3 KB its three functions take 0.3 ms (one CPU core), most of it the set-up of JSON
encoders and a regular expression. Tests hold the two equal on any text.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

ROW_OVERHEAD_BYTES = 256  # ours: the three ids, lengths, flags and short labels of a row in Arrow

_NOT_WORD = re.compile(r"[\W_]+")
_ASCII = bytes(range(128))
_LOWER_WORDS = bytes((ord(chr(byte).lower()) if chr(byte).isalnum() else 32) if byte < 128 else byte for byte in range(256))
_MAX_REPLACED_CHARACTERS = 16  # ours: beyond this many distinct non-ASCII characters one pass of the regular expression is faster
_ESCAPES = {bytes([code]): json.dumps(chr(code))[1:-1].encode() for code in (ord("\\"), ord('"'), *range(32))}  # the backslash comes first
_NEEDS_NO_ESCAPE = bytes(code for code in range(256) if bytes([code]) not in _ESCAPES)


class PairNames(NamedTuple):
    """The ids of a pair and its size in a pool (an upper bound of its Arrow bytes)."""

    pair_id: str
    comparison_id: str
    prompt_group: str
    num_bytes: int


def name_pair(prompt: Sequence[tuple[str, str]], chosen: str, rejected: str) -> PairNames:
    """Name a pair whose prompt is given as (role, content) tuples; roles are plain words.

    Raises:
        UnicodeEncodeError: a text holds half of a surrogate pair, so it has no UTF-8 form.
    """
    texts = [(role.encode(), content.encode()) for role, content in prompt]
    turns = b",".join([b'{"content":%b,"role":"%b"}' % (_json_string(content), role) for role, content in texts])
    prompt_part = b"[[%b]," % turns
    chosen_json = _json_string(chosen.encode())
    rejected_json = _json_string(rejected.encode())
    smaller, larger = (chosen_json, rejected_json) if chosen <= rejected else (rejected_json, chosen_json)
    reply_part = b"%b,%b]" % (chosen_json, rejected_json)
    pair_hash = blake2b(prompt_part, digest_size=16)
    comparison_hash = pair_hash.copy()
    pair_hash.update(reply_part)
    comparison_hash.update(b"[%b,%b]]" % (smaller, larger))
    return PairNames(
        pair_hash.hexdigest(),
        comparison_hash.hexdigest(),
        _prompt_group(texts, prompt_part),
        len(prompt_part) + len(reply_part) + ROW_OVERHEAD_BYTES,
    )


def _json_string(raw: bytes) -> bytes:
    """Write UTF-8 text as a JSON string with non-ASCII kept: most texts hold few of the characters to escape, or none."""
    found = raw.translate(None, _NEEDS_NO_ESCAPE)
    if found:
        for character, escape in _ESCAPES.items():
            if character in found:
                raw = raw.replace(character, escape)
    return b'"%b"' % raw


def _prompt_group(prompt: Sequence[tuple[bytes, bytes]], prompt_part: bytes) -> str:
    words = [(role, _words(content)) for role, content in prompt]
    if any(text for _, text in words):
        plain = b",".join([b'["%b","%b"]' % turn for turn in words])
        return blake2b(b"[%b]" % plain, digest_size=16).hexdigest()
    return blake2b(prompt_part[1:-1], digest_size=16).hexdigest()


def _words(raw: bytes) -> bytes:
    """Case-folded words joined by single spaces, as `schema.prompt_group` has them.

    Case folding and the word test look at one character at a time, so ASCII goes through a byte table and the few other characters of most
    texts are replaced one by one: several times faster than the regular expression over the whole text.
    """
    folded = raw.translate(_LOWER_WORDS)
    if not raw.isascii():
        characters = set(raw.translate(None, _ASCII).decode())
        if len(characters) > _MAX_REPLACED_CHARACTERS:
            return _NOT_WORD.sub(" ", raw.decode().casefold()).strip().encode()
        for character in characters:
            folded = folded.replace(character.encode(), _folded_character(character))
    return _single_spaces(folded).strip(b" ")


@lru_cache(maxsize=4096)
def _folded_character(character: str) -> bytes:
    return _NOT_WORD.sub(" ", character.casefold()).encode()


def _single_spaces(text: bytes) -> bytes:
    """Shorten every run of spaces to one; numpy takes a quarter of the time of replace, split or a regular expression here."""
    characters = np.frombuffer(text, np.uint8)
    keep = characters != ord(" ")
    keep[1:] |= keep[:-1].copy()
    shortened: bytes = characters[keep].tobytes()
    return shortened
