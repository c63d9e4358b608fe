"""What an ingest reads: its settings, and the files of its sources, found by name, in local copies, or on the hub."""

import glob
import posixpath
from collections.abc import Mapping

from pydantic import Field

from synpref_ray.errors import ConfigError
from synpref_ray.ingest.benchmark_prompts import DecontaminateConfig
from synpref_ray.ingest.catalogue import with_catalogue
from synpref_ray.ingest.source import PairColumns, Route, SourceConfig, check_source_names, find_source_files, list_source_files
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.tables.files import filesystem_of, find_files, is_file, is_folder
from synpref_ray.tables.pools import MAX_BYTES_PER_SHARD, MAX_PAIRS_PER_SHARD
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS

_MAX_NAMED_FILES = 5  # ours: enough to see which kind is meant


class IngestConfig(JobConfig):
    """What to read, and how pools are cut. Give `sources`, or `data`: a folder whose file names begin with the pool they feed."""

    data: str = ""
    """A folder, file or pattern of pair files; the beginning of a file's name says which pool it feeds (seed, unverified, else wild)."""
    sources: tuple[SourceConfig, ...] = ()
    """Sources of pairs, in place of `data`: published sets of the catalogue by name, and files with settings of their own."""
    copies: str = ""
    """A folder with local copies of catalogue sources, a folder for each by its name; for those without a path."""
    from_hub: bool = False
    """Whether catalogue sources without a path or a copy are streamed from the Hugging Face hub."""
    add: bool = False
    """Add to the pools that the workspace has: pairs that they hold are duplicates, the others join as new shards (a new version of the pool)."""
    columns: PairColumns = PairColumns()
    """Which columns hold what, for `data`; a source of `sources` says it itself."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Which benchmarks' prompts no pair may hold."""
    max_pairs_per_shard: int = Field(default=MAX_PAIRS_PER_SHARD, ge=1)
    """The most pairs in a file of a pool."""
    max_pairs_per_llm_shard: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)  # ours: as of gathered pools; one file is one engine's work
    """The same of the pools seed and unverified, which language models read as they lie (where it is more than `max_pairs_per_shard`, that holds)."""
    max_bytes_per_shard: int = Field(default=MAX_BYTES_PER_SHARD, ge=1)
    """About the most bytes of pairs in a file of a pool."""
    max_rejected_fraction: float = Field(default=0.5, ge=0.0, le=1.0)  # ours: duplicates aside, most rows refused means a wrong format
    """A file of which more rows are refused ends the job."""

    @property
    def pairs_per_shard(self) -> Mapping[Route, int]:
        """The most pairs in a shard of each pool."""
        for_llms = min(self.max_pairs_per_llm_shard, self.max_pairs_per_shard)
        return {Route.SEED: for_llms, Route.UNVERIFIED: for_llms, Route.WILD: self.max_pairs_per_shard}


def resolve_sources(config: IngestConfig) -> tuple[SourceConfig, ...]:
    """Return the sources of a config, those under `data` found by name.

    Our choice: a file (or the first folder under `data`) whose name begins with seed, unverified or wild feeds that pool; any other feeds wild.
    A source is named by its file's path under `data` (under the last folder before the first wildcard of a pattern), never by where `data` lies.

    Raises:
        ConfigError: neither or both of `data` and `sources` are given.
        InputError: nothing is there.
    """
    if bool(config.data) == bool(config.sources):
        raise ConfigError("give either data=FOLDER or a list of sources, not both and not neither")
    if config.sources:
        placed = tuple(_place(with_catalogue(source), config) for source in config.sources)
        check_source_names(placed)
        return placed
    found = list_source_files(SourceConfig(name="data", path=config.data))
    folder = _data_folder(config.data)
    sources = []
    for file in found:
        name = posixpath.relpath(filesystem_of(file)[1], folder)
        route = next((route for route in Route if name.startswith(route.value)), Route.WILD)
        sources.append(SourceConfig(name=name, path=file, route=route, columns=config.columns))
    return tuple(sources)


def passed_over_hint(config: IngestConfig) -> list[str]:
    """Return a line that names the files which no source reads since their names end otherwise; none where there is no such file."""
    sources = [SourceConfig(name="data", path=config.data)] if config.data else resolve_sources(config)
    over = [file for source in sources if source.path for file in find_source_files(source).passed_over]
    if not over:
        return []
    names = ", ".join(posixpath.basename(file) for file in over[:_MAX_NAMED_FILES])
    more = f" and {len(over) - _MAX_NAMED_FILES} more" if len(over) > _MAX_NAMED_FILES else ""
    remedy = "for CSV and JSON arrays declare a source with its format (docs/sources.md)" if config.data else "say format where they are pairs"
    return [f"passed over by name: {names}{more}; {remedy}"]


def _place(source: SourceConfig, config: IngestConfig) -> SourceConfig:
    """Say where a source is read: its path, its local copy, or (an empty path) the hub."""
    path = source.path or (f"{config.copies.rstrip('/')}/{source.name}" if config.copies else "")
    if not path:
        if not source.hub.dataset or not config.from_hub:
            remedy = "give it a path, or copies=FOLDER, or from_hub=true" if source.hub.dataset else "give it a path"
            raise ConfigError(f"source {source.name!r} has no path; {remedy}")
        return source
    if source.hub.files and is_folder(path):
        path = _pattern_below(path.rstrip("/"), source.hub.files)
    return source.model_copy(update={"path": path})


def _pattern_below(folder: str, files: str) -> str:
    """Return the pattern of a data set's files in a copy of it, or in a folder of the copy, which has the pattern's last parts alone."""
    parts = files.split("/")
    ends = [parts[start:] for start in range(len(parts))]
    patterns = [f"{folder}/{'/'.join(end)}" for end in ends if end == parts or not end[0].startswith("*") or len(end) > 1]
    for pattern in patterns:
        if find_files(pattern).files:
            return pattern
    return patterns[0]


def _data_folder(data: str) -> str:
    """Return the folder that source names are relative to, as the file system itself writes it (absolute, `~` resolved)."""
    _, root = filesystem_of(data)
    if not is_file(data):
        if is_folder(data):
            return str(root)
        while glob.has_magic(posixpath.dirname(root)):
            root = posixpath.dirname(root)
    return str(posixpath.dirname(root))
