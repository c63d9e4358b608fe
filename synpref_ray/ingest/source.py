"""What a source of preference pairs is, declared: where its files lie, which columns hold the pair, and which pool it feeds.

Paper: Sec. 3 (the pools): the 80K set seeds Stage 1, originally human-labelled sources join it unverified, everything else is the wild
pool of Stage 2.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from pydantic import Field, field_validator

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.ingest.adapters import Adapter
from synpref_ray.tables.files import find_files


class Route(StrEnum):
    """The pool a source feeds, most trusted first; the order decides which pool keeps a pair that several sources hold."""

    SEED = "seed"
    UNVERIFIED = "unverified"
    WILD = "wild"


class LabelKind(StrEnum):
    """Who made a source's labels."""

    HUMAN = "human"
    AI = "ai"
    VERIFIER = "verifier"
    UNKNOWN = "unknown"


class FileFormat(StrEnum):
    """How a pair file is written; `auto` goes by the file's name."""

    AUTO = "auto"
    PARQUET = "parquet"
    JSONL = "jsonl"
    JSON = "json"
    """One array of objects in a file, held in memory whole; plain or gzip."""
    CSV = "csv"
    """With a header line; every value is text; plain or gzip."""


PARQUET_SUFFIXES = (".parquet",)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_NAMED_JSONL_SUFFIXES = (*JSONL_SUFFIXES, ".json", ".json.gz")  # a .json file is often one big array: read only when called JSONL by name


class PairColumns(Settings):
    """The columns of a source that hold its pairs; other columns are ignored."""

    prompt: str = "prompt"
    """A string or a list of role/content messages; absent where chosen and rejected are whole conversations."""
    chosen: str = "chosen"
    """The preferred reply: a string, a list of messages, or the whole conversation as messages."""
    rejected: str = "rejected"
    """The other reply, in the same forms."""
    source_id: tuple[str, ...] = ("source_id", "pair_id", "id")  # ours: ids commonly published with pairs
    """Columns that may hold an id of the source's own; the first one with a value is kept as `source_id`."""


class HubDataset(Settings):
    """A data set on the Hugging Face hub."""

    dataset: str = ""
    """Its id, as in `nvidia/HelpSteer3`; empty: none."""
    revision: str = ""
    """A commit; empty: whatever is there when ingest begins, and the record says which commit that was."""
    config: str = ""
    """Its configuration, where it has several."""
    split: str = "train"
    """Its split."""
    files: str = ""
    """Path or pattern of the files inside the data set's folder, where it has more than one split or configuration; copies are read by it too."""


class SourceConfig(Settings):
    """One source of pairs and the pool it feeds."""

    name: str = Field(min_length=1)
    """The source's name, in the column `source` of its pairs; a catalogue row's name, without a path, brings that row's settings."""
    path: str = ""
    """A file, a folder (read recursively) or a glob pattern; local or any fsspec URL. Empty: a catalogue source's own place."""
    catalogue: str = ""
    """The catalogue row to take settings from, where the source has a path of its own or another name; what is given here wins."""
    format: FileFormat = FileFormat.AUTO
    """How the files are written; `auto` tells Parquet from JSONL by the file name."""
    columns: PairColumns = PairColumns()
    """Which columns hold the pair, where a row is one."""
    adapter: Adapter | None = None
    """How rows become pairs, where a row is not one (see `ingest/adapters.py`)."""
    where: dict[str, str] = Field(default={})
    """Only rows with these values (by path, compared as text without case) are read; the others are counted as `not_in_split`."""
    hub: HubDataset = HubDataset()
    """Where the data set is published."""
    licence: str = ""
    """As its publisher names it; for reports and exports."""
    route: Route = Route.WILD  # ours: the pool that trusts a label least
    """The pool that the pairs go to."""
    label_kind: LabelKind = LabelKind.UNKNOWN
    """Who made the labels; for reports only."""

    @field_validator("path")
    @classmethod
    def _is_not_blank(cls, path: str) -> str:
        if path and not path.strip():
            raise ValueError("must name a file, folder or pattern")
        return path


class SourceFiles(NamedTuple):
    """The files of a source, in the order they are read, and the visible files beside them that are passed over for their names."""

    files: tuple[str, ...]
    passed_over: tuple[str, ...]


def find_source_files(source: SourceConfig) -> SourceFiles:
    """Find the pair files of a source, by path, byte by byte.

    Our choice: in a folder, files whose name (or folder) starts with `.` or `_` and files of other formats are passed over.

    Raises:
        InputError: nothing is there, or nothing there is a pair file.
    """
    if not source.path:
        raise InputError(f"source {source.name!r} has no path, and is no row of the catalogue that could be read from elsewhere")
    try:
        found = find_files(source.path)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"source {source.name!r}: cannot list {source.path}: {' '.join(str(error).split())}") from None
    files = [file for file in found.files if not (found.folder and _is_hidden(file[len(found.folder) :]))]
    if not files:
        raise InputError(f"source {source.name!r}: found no file at {source.path}")
    files.sort(key=lambda file: file.encode("utf-8", "surrogateescape"))
    if found.is_one:
        return SourceFiles(tuple(files), ())
    chosen = tuple(file for file in files if _is_pair_file(file, source.format))
    if not chosen:
        wanted = "Parquet or JSONL" if source.format is FileFormat.AUTO else source.format.value
        remedy = "; files written otherwise are read by `format`, of a benchmark or in a list of sources: parquet, jsonl, json (one array) or csv"
        raise InputError(f"source {source.name!r}: none of the {len(files)} files at {source.path} is a {wanted} file by its name{remedy}")
    return SourceFiles(chosen, tuple(file for file in files if not _is_pair_file(file, source.format)))


def list_source_files(source: SourceConfig) -> tuple[str, ...]:
    """List the pair files of a source; see `find_source_files`."""
    return find_source_files(source).files


def file_format(file: str, declared: FileFormat) -> FileFormat:
    """Return the format a file is to be read in: the declared one, else by its name.

    Raises:
        InputError: the name tells nothing.
    """
    if declared is not FileFormat.AUTO:
        return declared
    name = file.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return FileFormat.PARQUET
    if name.endswith(JSONL_SUFFIXES):
        return FileFormat.JSONL
    endings = ", ".join((*PARQUET_SUFFIXES, *JSONL_SUFFIXES))
    raise InputError(f"cannot tell the format of {file}: expected a name ending in {endings}; or say format=parquet or format=jsonl")


def check_source_names(sources: Iterable[SourceConfig]) -> None:
    """Refuse two sources of one name: their pairs and counts could not be told apart.

    Raises:
        InputError: a name is used twice.
    """
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise InputError(f"two sources are called {source.name!r}; every source needs a name of its own")
        seen.add(source.name)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)


def _is_pair_file(file: str, declared: FileFormat) -> bool:
    name = file.lower()
    suffixes = {
        FileFormat.AUTO: (*PARQUET_SUFFIXES, *JSONL_SUFFIXES),
        FileFormat.PARQUET: PARQUET_SUFFIXES,
        FileFormat.JSONL: _NAMED_JSONL_SUFFIXES,
        FileFormat.JSON: (".json", ".json.gz"),
        FileFormat.CSV: (".csv", ".csv.gz"),
    }[declared]
    return name.endswith(suffixes)
