"""The screen misses no text that the exact search matches, and lets most others pass."""

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.ingest import screen
from synpref_ray.ingest.benchmark_prompts import BenchmarkItem, split_words
from synpref_ray.ingest.chunk import normalise_rows
from synpref_ray.ingest.decontamination import BenchmarkIndex, find_matches
from synpref_ray.ingest.screen import NgramScreen
from synpref_ray.ingest.source import SourceConfig

WORDS = [
    "one",
    "two",
    "three",
    "Four,",
    "five!",
    "été",
    "E\u0301TE\u0301",
    "请用",
    "カナ",
    "co\u00adop",
    "x_y",
    "3.5",
    "\x00",
    "ﬁne",
    "STRASSE",
    "straße",
]
TEXT = st.lists(st.sampled_from(WORDS), max_size=18).map(" ".join)


def index_of(prompts: list[str], *, candidates: bool) -> BenchmarkIndex:
    items = [BenchmarkItem("bench", str(place), words) for place, text in enumerate(prompts) if (words := split_words(text))]
    return BenchmarkIndex(items, candidates=candidates)


@settings(max_examples=40)
@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT), max_size=5), st.booleans(), st.integers(20, 200))
def test_matches_are_those_of_the_search_without_a_screen(
    prompts: list[str], rows: list[tuple[str, str, str, str]], candidates: bool, block_bytes: int
) -> None:
    index = index_of(prompts, candidates=candidates)
    messages = [[{"role": role, "content": f"a{text}" if not text.strip() else text} for role, text in zip(ROLES, row, strict=False)] for row in rows]
    pairs = [{"prompt": prompt, "chosen": f"{row[3]} .", "rejected": f"{row[0]} no"} for prompt, row in zip(messages, rows, strict=True)]
    table = normalise_rows(pairs, SourceConfig(name="s", path="x")).pairs
    assert table.num_rows == len(rows)
    wanted = [index.find(row["prompt"], row["chosen"], row["rejected"]) for row in table.to_pylist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "BLOCK_BYTES", block_bytes)
        patch.setattr(screen, "_POWERS", screen._POWERS[: block_bytes + 1])
        smaller = index_of(prompts, candidates=candidates)
        assert find_matches(table, smaller) == wanted
    assert find_matches(table, index) == wanted


ROLES = ("user", "assistant", "user")


def sentences(seed: int, number: int, length: int) -> list[str]:
    chance = random.Random(seed)
    vocabulary = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 7))) for _ in range(300)]
    return [" ".join(chance.choices(vocabulary, k=length)) for _ in range(number)]


def test_few_texts_pass_that_share_nothing() -> None:
    texts = sentences(3, 400, 60)
    found = NgramScreen([split_words(text) for text in sentences(5, 300, 60)], [], 5, split_words)
    assert not found.find(pa.array(texts), np.ones(len(texts), np.bool_)).any()
    texts[7] += " " + " ".join(sentences(5, 300, 60)[20].split()[30:35]).upper() + "."
    texts[9] += " " + " ".join(sentences(5, 300, 60)[20].split()[30:34])
    assert np.flatnonzero(found.find(pa.array(texts), np.ones(len(texts), np.bool_))).tolist() == [7]


def test_windows_do_not_span_texts_and_slices_are_read_where_they_begin() -> None:
    found = NgramScreen([("a", "b", "c", "d", "e")], [("hi",)], 5, split_words)
    texts = pa.array(["a b c", "d e", "", "x a-b c d,e", "hi", "é hi", "abcde"])
    everyone = np.ones(len(texts), np.bool_)
    assert found.find(texts, everyone).tolist() == [False, False, False, True, True, False, False]
    assert found.find(texts, ~everyone).tolist() == [False, False, False, True, False, False, False]
    assert found.find(texts.slice(3, 2), everyone[:2]).tolist() == [True, True]
    assert found.find(pa.array([], pa.string()), everyone[:0]).tolist() == []
    assert found.find(pa.array(["", ""]), everyone[:2]).tolist() == [False, False]


def test_texts_longer_than_a_block_are_looked_at() -> None:
    long = "z" * (screen.BLOCK_BYTES + 1)
    found = NgramScreen([split_words(f"{long} a b c d e")], [], 5, split_words)
    assert found.find(pa.array([long, "a b c d e", "é" * screen.BLOCK_BYTES]), np.zeros(3, np.bool_)).tolist() == [True, True, True]


def test_characters_are_folded_as_the_search_folds_them() -> None:
    codes = [*range(128, 0x3400, 3), *range(0x3400, 0xD7FF, 97), *range(0xE000, 0x11000, 11), *range(0x16D40, 0x16D80), 0x1F600, 0x2F800]
    known = {chr(code): folded for code in codes if (folded := screen._folded(chr(code))) is not None}
    assert len(known) > 1500
    assert all(screen._folded(character) is not None for character in "\u00e9\u201c\u2013\u00df\u4e2d\u30ca\u20ac")
    for character, folded in known.items():
        assert f"x{character}y b".replace(character, folded.decode()).split() == list(split_words(f"X{character}y b")), hex(ord(character))
    assert [screen._folded(character) for character in "\u0301\u00ad\ufb01\uff21\u1161\u09be"] == [None] * 6
