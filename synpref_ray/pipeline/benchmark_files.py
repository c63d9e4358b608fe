"""Where benchmarks come from: a folder of official files under `data`, the hub, or any file of pairs or of one reply against several."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks import BENCHMARKS
from synpref_ray.evaluation.benchmarks.core import Benchmark, HubPart, Item, Part, ReadItems, Row
from synpref_ray.evaluation.benchmarks.pairs import (
    PAIRS_VERIFIED,
    is_one_against_many,
    measure_one_against_many,
    measure_pairs,
    pair_items,
    read_one_against_many,
)
from synpref_ray.ingest.hub import hub_address, pin_revision, read_hub_rows
from synpref_ray.ingest.readers import read_file_rows, read_pair_file
from synpref_ray.ingest.source import FileFormat, HubDataset, PairColumns, SourceConfig
from synpref_ray.schema import stable_uniform
from synpref_ray.tables.files import FoundFiles, find_files, is_file, is_folder

PAIR_FILES = (".parquet", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_OFFICIAL_FILES = (*PAIR_FILES, ".json", ".json.gz")
_COPY = 0.5  # ours: official files may share a few items; of which this part is in another file is a copy of it


@dataclass(frozen=True)
class FoundBenchmark:
    """A benchmark with its files, or the splits on the hub where it has none here; `benchmark` is None for a file that names none."""

    name: str
    benchmark: Benchmark | None
    files: tuple[str, ...] = ()
    hub: tuple[HubDataset, ...] = ()

    @property
    def places(self) -> list[str]:
        """Where its items are read, for the record."""
        return [*self.files, *(hub_address(hub) for hub in self.hub)]


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark with its items."""

    name: str
    benchmark: Benchmark
    read: ReadItems
    is_pair_file: bool = False


def find_benchmark(name: str, data: str, *, from_hub: bool = False) -> FoundBenchmark:
    """Find a benchmark by its name, or a file by its path or its name under `data`.

    Our choice: a known benchmark's folder under `data` comes first (or `data` itself, if it has that folder's name), then a file, then the hub. A URL
    or an absolute path is itself alone, and is not looked for under `data`.

    Raises:
        InputError: nothing of it is there.
    """
    known = BENCHMARKS.get(name)
    official, others = _official_files(known, data) if known is not None else ([], [])
    if official:
        return FoundBenchmark(name, known, files=tuple(official))
    below = f"{data.rstrip('/')}/{name}"
    choices = [name] if "://" in name or name.startswith("/") else [below, *(f"{below}{ending}" for ending in PAIR_FILES), name]
    file = next((choice for choice in choices if choice.lower().endswith(PAIR_FILES) and _is_there(choice)), None)
    if file is not None:
        return FoundBenchmark(file.rsplit("/", 1)[-1].split(".")[0], None, files=(file,))
    if known is not None and known.hub and from_hub:
        return FoundBenchmark(name, known, hub=tuple(pin_revision(_hub_dataset(part)) for part in known.hub))
    remedy = f"expected a file of pairs ({', '.join(PAIR_FILES)}) at that path or in data={data}"
    if known is not None:
        remedy += f", or its official files in a folder {' or '.join(known.folders)} there" + (", or from_hub=true" if known.hub else "")
        remedy += f"; not of its official set: {', '.join(others[:3])}" if others else ""
    else:
        remedy += f"; known benchmarks: {', '.join(BENCHMARKS)}"
    raise InputError(f"benchmark {name!r}: {remedy}")


def _is_there(file: str) -> bool:
    try:
        return is_file(file)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot look for {file}: {' '.join(str(error).split())}") from None


def find_benchmarks(names: Sequence[str], data: str, *, from_hub: bool = False) -> dict[str, FoundBenchmark]:
    """Find several benchmarks, by their names.

    Raises:
        InputError: one of them is not there, or two have one name.
    """
    found: dict[str, FoundBenchmark] = {}
    for name in names:
        one = find_benchmark(name, data, from_hub=from_hub)
        if one.name in found:
            raise InputError(f"two benchmarks are called {one.name!r}: {', '.join(found[one.name].places)} and {', '.join(one.places)}")
        found[one.name] = one
    return found


def load_benchmark(found: FoundBenchmark, columns: PairColumns, *, sample_fraction: float = 1.0, seed: int = 0) -> LoadedBenchmark:
    """Read a benchmark's items, or a seeded part of them.

    Raises:
        InputError: a file cannot be read, a row of an official file is not of its format, or there is no item.
    """
    loaded = _load(found, columns)
    items = loaded.read.items
    if 0 < loaded.benchmark.num_items < len(items):
        raise InputError(
            f"benchmark {found.name!r}: its official set has {loaded.benchmark.num_items} items, found {len(items)} in {', '.join(found.places)}: "
            "leave the files of that set alone there, each once, or its metrics are not the official ones"
        )
    if sample_fraction < 1.0:
        items = [item for item in items if stable_uniform(seed, item.name, "evaluation-sample") < sample_fraction]
    if not items:
        raise InputError(f"benchmark {found.name!r} has no item{'' if sample_fraction == 1.0 else ' in this sample'}: {', '.join(found.places)}")
    return LoadedBenchmark(loaded.name, loaded.benchmark, ReadItems(items, loaded.read.left_out), loaded.is_pair_file)


def _load(found: FoundBenchmark, columns: PairColumns) -> LoadedBenchmark:
    if found.benchmark is not None:
        parts = [Part(file, _rows(file)) for file in found.files]
        parts += [Part(hub_address(hub), [row.values for row in read_hub_rows(hub)]) for hub in found.hub]
        read = found.benchmark.read(parts)
        _refuse_copies(found.benchmark, parts, read.items)
        return LoadedBenchmark(found.name, found.benchmark, read)
    file = found.files[0]
    if _first_is_one_against_many(file):
        benchmark = benchmark_of_file(found.name, many=True)
        return LoadedBenchmark(found.name, benchmark, benchmark.read([Part(file, _rows(file))]))
    return LoadedBenchmark(found.name, benchmark_of_file(found.name, many=False), ReadItems(read_pair_items(file, columns)), is_pair_file=True)


def _refuse_copies(benchmark: Benchmark, parts: Sequence[Part], items: Sequence[Item]) -> None:
    """Refuse a file that repeats another one: every metric would weigh its items twice. What a benchmark reads once by itself is no copy."""
    if _num_repeated(_contents(items)) == 0:
        return
    of_part = {part.name: _contents(benchmark.read([part]).items) for part in parts}
    if _num_repeated(_contents(items)) <= sum(_num_repeated(contents) for contents in of_part.values()):
        return
    for one, other in combinations(of_part, 2):
        num_shared = len(of_part[one].keys() & of_part[other].keys())
        if num_shared and num_shared >= _COPY * min(len(of_part[one]), len(of_part[other])):
            raise InputError(f"benchmark {benchmark.name!r}: {one} and {other} hold {num_shared} items in common: leave one of them out")


def _contents(items: Sequence[Item]) -> Counter[tuple[str, tuple[str, ...], str]]:
    return Counter((item.prompt_key, item.replies, item.subset) for item in items)


def _num_repeated(contents: Counter[tuple[str, tuple[str, ...], str]]) -> int:
    return contents.total() - len(contents)


def read_pair_items(file: str, columns: PairColumns) -> list[Item]:
    """Return an item for every row of a pair file, in their order; one that is no pair has a problem.

    Raises:
        InputError: the file cannot be read.
    """
    chunks = list(read_pair_file(file, SourceConfig(name="file", path=file, columns=columns)))
    pairs = [row for chunk in chunks for row in chunk.pairs.select(["row", "pair_id", "prompt", "chosen", "rejected"]).to_pylist()]
    return pair_items(pairs, [row for chunk in chunks for row in chunk.rejects.select(["row", "reason"]).to_pylist()])


def benchmark_of_file(name: str, *, many: bool) -> Benchmark:
    """Return the benchmark of a file of pairs, or of one reply against many."""
    return Benchmark(
        name=name,
        read=read_one_against_many,
        measure=measure_one_against_many if many else measure_pairs,
        verified=PAIRS_VERIFIED,
        headline=("accuracy", "mrr") if many else ("accuracy",),
        num_items=0,
        folders=(),
    )


def _first_is_one_against_many(file: str) -> bool:
    row = next(iter(read_file_rows(file, FileFormat.AUTO)), None)
    return row is not None and row.reason is None and is_one_against_many(row.values)


def _rows(file: str) -> list[Row]:
    rows = list(read_file_rows(file, FileFormat.JSON if file.lower().endswith((".json", ".json.gz")) else FileFormat.AUTO))
    broken = next((row for row in rows if row.reason is not None), None)
    if broken is not None:
        raise InputError(f"{file}, row {broken.number}: {broken.reason}; an official file has no such row, fetch it again")
    return [row.values for row in rows]


def _official_files(benchmark: Benchmark, data: str) -> tuple[list[str], list[str]]:
    """Return the benchmark's files under `data`, sorted by path; where there are none, the files in its folders that are not of its official set."""
    own = [data] if data.rstrip("/").rsplit("/", 1)[-1] in benchmark.folders else []
    others: list[str] = []
    for folder in (*(f"{data.rstrip('/')}/{name}" for name in benchmark.folders), *own):
        try:
            found = find_files(folder) if is_folder(folder) else FoundFiles([], False)
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"cannot list {folder}: {' '.join(str(error).split())}") from None
        below = [(path, path[len(found.folder) :].lstrip("/")) for path in sorted(found.files)]
        below = [(path, name) for path, name in below if name.lower().endswith(_OFFICIAL_FILES) and not _is_hidden(name)]
        files = [path for path, name in below if benchmark.is_part(name)]
        if files:
            return files, []
        others += [path for path, _ in below]
    return [], others


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _hub_dataset(part: HubPart) -> HubDataset:
    return HubDataset(dataset=part.dataset, split=part.split, config=part.config)
