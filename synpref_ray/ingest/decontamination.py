"""Benchmark prompts in preference pairs: overlaps of 13 words, equal short prompts, and shorter overlaps that a judge has yet to confirm.

Paper: App. C drops a pair whose text shares a 13-gram with the first-turn prompt of a benchmark; v3 looks for n = 5..13 on prompt, chosen and
rejected and lets a judge strike false alarms. Our choice, all else:

- Words and benchmark items are as `benchmark_prompts.py` reads them. Prompt turns and replies are looked at one by one, so that no n-gram spans two.
- A benchmark prompt of fewer than 13 words has no 13-gram: it matches a user turn of the same words.
- Overlaps of 5 to 12 words only propose; nothing is dropped for them here (`pipeline/leaks.py` asks a judge).
- A pair is reported once for every benchmark item that it meets, with the longest words they share; of candidates the longest `max_candidates`.

Speed: a screen (screen.py) names the texts that share their shortest n-gram with a benchmark, or may equal a short prompt. Only in these words
become numbers of a vocabulary of the benchmarks, and n-grams rolling hashes; a hit is then compared word by word. N benchmark items, W words.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.ingest.benchmark_prompts import BenchmarkItem, Words, split_words
from synpref_ray.ingest.chunk import REJECTS_SCHEMA, Chunk, row_to_json
from synpref_ray.ingest.screen import NgramScreen
from synpref_ray.schema import DropReason, Role

FULL_NGRAM = 13  # App. C
MIN_NGRAM = 5  # App. C (v3)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # ours: odd, so that powers do not vanish; collisions only cost a comparison
_UNKNOWN = -1


class MatchKind(StrEnum):
    """How a pair meets a benchmark prompt."""

    OVERLAP = "overlap"
    """A shared n-gram of 13 words."""
    EXACT = "exact"
    """A user turn equals a prompt of fewer than 13 words."""
    CANDIDATE = "candidate"
    """A shared n-gram of 5 to 12 words: for a judge to say."""


class Match(NamedTuple):
    """One meeting of a text with a benchmark prompt; `ngram` is the normalised text they share."""

    kind: MatchKind
    benchmark: str
    item: str
    field: str
    n: int
    ngram: str


MATCHES_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("kind", "benchmark", "item", "field")),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("ngram", pa.string(), nullable=False),
    ]
)


class BenchmarkIndex:
    """The n-grams of benchmark prompts, ready to be looked up; built once per process, some hundred bytes a word."""

    def __init__(self, items: Sequence[BenchmarkItem], *, candidates: bool = True):
        self._items = items
        self._sizes = range(MIN_NGRAM if candidates else FULL_NGRAM, FULL_NGRAM + 1)
        self._vocabulary: dict[str, int] = {}
        self._exact: dict[Words, list[int]] = {}
        places: dict[int, dict[int, list[tuple[int, int]]]] = {n: {} for n in self._sizes}
        for number, item in enumerate(items):
            ids = np.array([self._vocabulary.setdefault(word, len(self._vocabulary)) for word in item.words], np.int64)
            if len(item.words) < FULL_NGRAM:
                self._exact.setdefault(item.words, []).append(number)
            for n, hashes in _rolling_hashes(ids, FULL_NGRAM):
                if n in places:
                    for start, key in enumerate(hashes.tolist()):
                        places[n].setdefault(key, []).append((number, start))
        self._places = places
        self._known = {n: np.sort(np.fromiter(found, np.uint64, len(found))) for n, found in places.items()}
        self._screen = NgramScreen((item.words for item in items), self._exact, self._sizes[0], split_words)

    def screen(self, pairs: pa.Table) -> dict[int, set[str]]:
        """Return the fields that `find` has to look at, by the place of their pair; it finds nothing in any other."""
        fields: dict[int, set[str]] = {}
        prompts = _whole(pairs["prompt"])
        messages, lengths = prompts.flatten(), prompts.value_lengths().to_numpy()
        is_user = pc.equal(messages.field("role"), Role.USER.value).to_numpy(zero_copy_only=False)
        turns = np.flatnonzero(self._screen.find(messages.field("content"), is_user))
        firsts = np.cumsum(lengths) - lengths
        owners = np.repeat(np.arange(len(lengths)), lengths)[turns]
        for pair, place in zip(owners.tolist(), (turns - firsts[owners]).tolist(), strict=True):
            fields.setdefault(pair, set()).add(f"prompt.{place}")
        for name in ("chosen", "rejected"):
            found = self._screen.find(_whole(pairs[name]), np.zeros(pairs.num_rows, np.bool_))
            for pair in np.flatnonzero(found).tolist():
                fields.setdefault(pair, set()).add(name)
        return fields

    def find(self, prompt: Sequence[Mapping[str, str]], chosen: str, rejected: str, fields: Collection[str] | None = None) -> list[Match]:
        """Return the matches of a pair: every benchmark item that it meets once, those with an overlap or an exact match first, then candidates.

        Candidates come longest first, each with the first of the longest n-grams that the item shares with the pair.

        Args:
            fields: look at these alone (`prompt.0` …, `chosen`, `rejected`), as `screen` named them.
        """
        texts = [(f"prompt.{place}", message["content"], message["role"] == Role.USER) for place, message in enumerate(prompt)]
        texts += [("chosen", chosen, False), ("rejected", rejected, False)]
        if fields is not None:
            texts = [text for text in texts if text[0] in fields]
        sure: dict[int, Match] = {}
        candidates: dict[int, Match] = {}
        for field, text, is_user in texts:
            words = split_words(text)
            if is_user:
                for number in self._exact.get(words, ()):
                    sure.setdefault(number, self._match(MatchKind.EXACT, number, field, words))
            for number, ngram in self._overlaps(words).items():
                if len(ngram) == FULL_NGRAM:
                    sure.setdefault(number, self._match(MatchKind.OVERLAP, number, field, ngram))
                elif number not in candidates or len(ngram) > candidates[number].n:
                    candidates[number] = self._match(MatchKind.CANDIDATE, number, field, ngram)
        longest_first = sorted(candidates.keys() - sure.keys(), key=lambda number: (-candidates[number].n, number))
        return [*sure.values(), *(candidates[number] for number in longest_first)]

    def _match(self, kind: MatchKind, number: int, field: str, ngram: Words) -> Match:
        item = self._items[number]
        return Match(kind, item.benchmark, item.item, field, len(ngram), " ".join(ngram))

    def _overlaps(self, words: Words) -> dict[int, Words]:
        """Return by item the first of the longest n-grams that it shares with these words."""
        ids = np.fromiter(map(self._vocabulary.get, words, repeat(_UNKNOWN)), np.int64, len(words))
        shortest = self._sizes[0]
        found: dict[int, Words] = {}
        if len(ids) < shortest:
            return found
        starts = _known_windows(ids, shortest)
        for n, hashes in _rolling_hashes(ids, FULL_NGRAM):
            if n < shortest:
                continue
            starts = starts[starts < len(hashes)]
            starts = starts[_contains(self._known[n], hashes[starts])]
            if len(starts) == 0:
                break  # where an item shares n words it shares the first n - 1 of them
            longest: dict[int, Words] = {}
            for start in starts.tolist():
                ngram = words[start : start + n]
                for number, at in self._places[n][int(hashes[start])]:
                    if number not in longest and self._items[number].words[at : at + n] == ngram:  # a hash may collide; words do not
                        longest[number] = ngram
            found |= longest
        return found


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _rolling_hashes(ids: npt.NDArray[np.int64], longest: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """Yield (n, hash of every window of n words) for n = 1 … longest; one step longer costs one multiplication and one addition a window."""
    values = (ids + 1).astype(np.uint64)
    hashes = np.zeros(len(ids), np.uint64)
    for n in range(1, min(longest, len(ids)) + 1):
        hashes = hashes[: len(ids) - n + 1] * _BASE + values[n - 1 :]
        yield n, hashes


def _known_windows(ids: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Return where windows of n words start that the vocabulary has every word of."""
    unknown = np.concatenate([[0], np.cumsum(ids < 0)])
    return np.flatnonzero(unknown[n:] == unknown[:-n])


def _contains(known: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    if len(known) == 0:
        return np.zeros(len(hashes), np.bool_)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    result: npt.NDArray[np.bool_] = known[places] == hashes
    return result


def find_matches(pairs: pa.Table, index: BenchmarkIndex) -> list[list[Match]]:
    """Return the matches of every pair of a table with prompt, chosen and rejected."""
    matches: list[list[Match]] = [[] for _ in range(pairs.num_rows)]
    fields = index.screen(pairs)
    rows = pairs.select(["prompt", "chosen", "rejected"]).take(pa.array(sorted(fields), pa.int64())).to_pylist()
    for place, row in zip(sorted(fields), rows, strict=True):
        matches[place] = index.find(row["prompt"], row["chosen"], row["rejected"], fields[place])
    return matches


def drop_contaminated(chunk: Chunk, matches: Sequence[Sequence[Match]]) -> Chunk:
    """Move pairs with an overlap or an exact match to the rejects, each with the first such match."""
    hits = [place for place, found in enumerate(matches) if is_contaminated(found)]
    if not hits:
        return chunk
    pairs = chunk.pairs.take(pa.array(hits))
    texts = []
    for place, row in zip(hits, pairs.select(["prompt", "chosen", "rejected", "source_id"]).to_pylist(), strict=True):
        match = next(match for match in matches[place] if match.kind is not MatchKind.CANDIDATE)
        texts.append(row_to_json({**row, "contamination": {**match._asdict(), "kind": match.kind.value}}))
    columns = {name: pairs.column(name) for name in ("source", "file", "row")}
    columns |= {"reason": pa.repeat(pa.scalar(DropReason.CONTAMINATED.value), len(hits)), "row_json": pa.array(texts, pa.string())}
    rejects = pa.concat_tables([chunk.rejects, pa.table(columns).cast(REJECTS_SCHEMA)])
    keep = np.ones(chunk.pairs.num_rows, np.bool_)
    keep[hits] = False
    return chunk._replace(pairs=chunk.pairs.filter(pa.array(keep)), rejects=rejects)


def is_contaminated(matches: Iterable[Match]) -> bool:
    """Whether matches say more than that a judge should look."""
    return any(match.kind is not MatchKind.CANDIDATE for match in matches)


def limit_candidates(matches: Sequence[Sequence[Match]], limit: int) -> tuple[list[list[Match]], int]:
    """Return matches with at most `limit` candidates a pair, the first of them, and how many candidates that leaves out."""
    kept = []
    for found in matches:
        num_sure = sum(match.kind is not MatchKind.CANDIDATE for match in found)  # they come first
        kept.append(list(found[: num_sure + limit]))
    return kept, sum(len(found) - len(some) for found, some in zip(matches, kept, strict=True))


def count_matches(matches: Iterable[Sequence[Match]]) -> dict[tuple[str, str], int]:
    """Return by (benchmark, kind) how many pairs match it; equal pairs count each, so that sums over chunks do not depend on where they were cut."""
    counts: Counter[tuple[str, str]] = Counter()
    for found in matches:
        counts.update({(match.benchmark, match.kind.value) for match in found})
    return dict(counts)


def matches_table(pairs: pa.Table, matches: Sequence[Sequence[Match]]) -> pa.Table:
    """Return the report: one line a match, naming pair, benchmark item and n-gram (MATCHES_SCHEMA)."""
    names = ("pair_id", "source", "file", "row")
    rows = zip(*(pairs.column(name).to_pylist() for name in names), strict=True)
    lines = [
        dict(zip(names, row, strict=True)) | {**match._asdict(), "kind": match.kind.value}
        for row, found in zip(rows, matches, strict=True)
        for match in found
    ]
    return pa.Table.from_pylist(lines, schema=MATCHES_SCHEMA)
