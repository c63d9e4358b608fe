"""The prompts of benchmarks that preference pairs are compared with: settings, files, and the words that count as equal.

Paper: App. C compares with the first-turn prompts. Our choice, all else: words are runs of letters and digits in Unicode's form NFKC, case-folded and
without format characters (soft hyphens, zero-width joiners); a Han or kana character is a word of its own. A folder's files are all read, or named.
"""

import posixpath
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.ingest.fields import TextForm, dig, read_chat, read_form, read_turn_texts
from synpref_ray.ingest.readers import read_file_rows
from synpref_ray.ingest.source import FileFormat, SourceConfig, find_source_files
from synpref_ray.schema import DropReason, Role
from synpref_ray.tables.pools import content_digest

MATCHER_VERSION = 2
"""Of what counts as an equal word; part of a decontaminated ingest's fingerprint."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_UNREAD_SUFFIXES = (".json", ".json.gz", ".csv", ".csv.gz")
"""Of files that may hold prompts, and that a folder or pattern passes over unless it says their format: their pairs would not be looked for."""
_SUFFIXES = (*(f"{suffix}.gz" for suffix in (".jsonl", ".ndjson", ".json", ".csv")), ".parquet", ".jsonl", ".ndjson", ".json", ".csv")
_MAX_NAMED = 3

Words = tuple[str, ...]


class Action(StrEnum):
    """What happens to pairs with an overlap or an exact match."""

    DROP = "drop"
    REPORT = "report"


class BenchmarkFile(Settings):
    """A benchmark's file or folder of files."""

    path: str = Field(min_length=1)
    """A file, folder or pattern, local or any fsspec URL."""
    name: str = ""
    """Empty: the path, as given."""
    format: FileFormat = FileFormat.AUTO
    """A `.json` file is one array, or JSON lines where it says so here."""
    prompt: tuple[str, ...] = ("prompt", "question", "conversation_input", "instruction")  # ours: the names in the benchmarks of the paper
    """Paths that may hold the prompt (text or messages); the first that a row has."""
    form: TextForm = TextForm.PLAIN
    """How the prompt is written, where it is neither text nor messages: a transcript, JSON inside text."""
    id: tuple[str, ...] = ("id", "pair_id", "pair_uid")
    """Columns that may hold the item's id; else its number in the file."""


class DecontaminateConfig(Settings):
    """Which benchmarks to look for, and what to do."""

    benchmarks: tuple[BenchmarkFile, ...] = ()
    action: Action = Action.DROP
    """Whether contaminated pairs are dropped (as rejects) or only reported."""
    candidates: bool = True
    """Whether overlaps of 5 to 12 words are looked for and reported."""
    max_candidates: int = Field(default=16, ge=1)  # ours: a set phrase may stand in hundreds of benchmark prompts; each is two questions to a judge
    """The most benchmark items with which a pair's overlaps of 5 to 12 words are reported, the longest first; those beyond are counted."""


class BenchmarkItem(NamedTuple):
    """A first-turn prompt of a benchmark, as words."""

    benchmark: str
    item: str
    words: Words


def split_words(text: str) -> Words:
    """Return a text's words as they are compared."""
    if text.isascii():  # most texts: nothing else to do
        return tuple(_WORD.findall(text.lower()))
    plain = _format_characters().sub("", unicodedata.normalize("NFKC", text))
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", plain.casefold())))


@lru_cache(maxsize=1)
def _format_characters() -> re.Pattern[str]:
    """Return a pattern of all characters of Unicode's category Cf."""
    return re.compile(f"[{''.join(re.escape(chr(code)) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == 'Cf')}]+")


def first_turn(prompt: object, form: TextForm = TextForm.PLAIN) -> str | None:
    """Return the first user message of a prompt (text, or messages under any of the names that sources may use), None if there is none."""
    if form is TextForm.JSON_TURNS:
        texts = read_turn_texts(prompt)
        return texts[0] if isinstance(texts, list) and texts else None
    read = read_form(prompt, form)
    if isinstance(read, DropReason):
        return None
    if isinstance(read, str):
        return read
    turns = read_chat(read)
    if isinstance(turns, DropReason):
        return None
    return next((turn["content"] for turn in turns if turn["role"] == Role.USER), None)


def read_benchmarks(config: DecontaminateConfig) -> list[BenchmarkItem]:
    """Read the first-turn prompts of all benchmarks, in order.

    Raises:
        InputError: a file is not there or not readable, or has not one prompt.
    """
    return [item for found in read_benchmark_rows(config) for item in found if isinstance(item, BenchmarkItem)]


def count_benchmark_items(config: DecontaminateConfig) -> dict[str, dict[str, int]]:
    """Return by benchmark how many rows were read as items, and how many were skipped because no prompt could be read."""
    counts: dict[str, dict[str, int]] = {}
    for found in read_benchmark_rows(config):
        for item in found:
            entry = counts.setdefault(item if isinstance(item, str) else item.benchmark, {"read": 0, "skipped": 0})
            entry["skipped" if isinstance(item, str) else "read"] += 1
    return counts


def comparison_facts(config: DecontaminateConfig) -> dict[str, Any]:
    """Return, for the record of an ingest, what pairs are compared with: prompts by benchmark, as digests, and which candidates are looked for."""
    items: dict[str, list[list[Any]]] = {}
    for item in read_benchmarks(config):
        items.setdefault(item.benchmark, []).append([item.item, list(item.words)])
    benchmarks = {name: content_digest(found) for name, found in sorted(items.items())}
    return {"benchmarks": benchmarks, **candidate_settings(config)}


def candidate_settings(config: DecontaminateConfig) -> dict[str, Any]:
    """Return what decides which shorter overlaps are reported."""
    return {"candidates": config.candidates, **({"max_candidates": config.max_candidates} if config.candidates else {})}


def read_benchmark_rows(config: DecontaminateConfig) -> Iterator[list[BenchmarkItem | str]]:
    """Yield the rows of every benchmark file: an item, or the benchmark's name where a row has no prompt.

    Raises:
        InputError: as `read_benchmarks` says.
    """
    for found in _read_files(config):
        yield [item for item, _ in found]


def read_benchmark_texts(config: DecontaminateConfig) -> Iterator[tuple[BenchmarkItem, str]]:
    """Yield every item of all benchmarks with its prompt as it stands in the file.

    Raises:
        InputError: as `read_benchmarks` says.
    """
    for found in _read_files(config):
        yield from ((item, text) for item, text in found if isinstance(item, BenchmarkItem))


def _read_files(config: DecontaminateConfig) -> Iterator[list[tuple[BenchmarkItem | str, str]]]:
    names = _ItemNames()
    for benchmark in config.benchmarks:
        name = benchmark.name or benchmark.path
        files = find_source_files(SourceConfig(name=name, path=benchmark.path, format=benchmark.format))
        unread = [file for file in files.passed_over if file.lower().endswith(_UNREAD_SUFFIXES)]
        if unread and benchmark.format is FileFormat.AUTO:
            listed = ", ".join(unread[:_MAX_NAMED]) + (f" and {len(unread) - _MAX_NAMED} more" if len(unread) > _MAX_NAMED else "")
            remedy = f"give each as a benchmark if it holds prompts; if not, {_by_pattern(files.files, unread)}"
            raise InputError(f"benchmark {name}: {benchmark.path} has files that are read only where they are named: {listed}; {remedy}")
        for file in files.files:
            aside = f"; if it holds none, {_by_pattern(files.files, [file])}" if len(files.files) > 1 else ""
            try:
                found = list(_read_items(file, name, benchmark))
            except InputError as error:
                raise InputError(f"benchmark {name}: {error}{aside}") from None
            if not any(isinstance(item, BenchmarkItem) for item, _ in found):
                raise InputError(f"benchmark {name}: no row of {file} has a prompt in one of the columns {', '.join(benchmark.prompt)}{aside}")
            yield [(names.tell_apart(item) if isinstance(item, BenchmarkItem) else item, text) for item, text in found]


def _by_pattern(files: Sequence[str], without: Sequence[str]) -> str:
    """Return how to name a benchmark's files without some of them."""
    other = next((file for file in files if file not in without), files[0])
    ending = next((suffix for suffix in _SUFFIXES if other.lower().endswith(suffix)), "")
    return f"name the files with prompts by a pattern, as in path={posixpath.dirname(other)}/*{ending}"


class _ItemNames:
    """Tells items of one name apart (rows of several files, by their numbers): the second prompt that is called `7` becomes `7#2`."""

    def __init__(self) -> None:
        self._prompts: dict[tuple[str, str], dict[Words, int]] = {}

    def tell_apart(self, item: BenchmarkItem) -> BenchmarkItem:
        prompts = self._prompts.setdefault((item.benchmark, item.item), {})
        place = prompts.setdefault(item.words, len(prompts))
        return item._replace(item=f"{item.item}#{place + 1}") if place else item


def _read_items(file: str, name: str, benchmark: BenchmarkFile) -> Iterator[tuple[BenchmarkItem | str, str]]:
    named_json = file.lower().endswith((".json", ".json.gz")) and benchmark.format is FileFormat.AUTO
    for row in read_file_rows(file, FileFormat.JSON if named_json else benchmark.format):
        prompt = next((text for path in benchmark.prompt if (text := first_turn(dig(row.values, path), benchmark.form)) is not None), None)
        own = next((value for path in benchmark.id if (value := dig(row.values, path)) is not None), row.number)
        words = split_words(prompt or "")
        yield (BenchmarkItem(name, str(own), words) if words else name), prompt or ""
