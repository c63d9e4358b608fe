"""Hygiene of pools on Ray: a sidecar `hygiene` with each pair's language, lengths, cycles and near-duplicates; the pools stay as they are.

Paper: Sec. 3, App. D.4 (see `ingest/hygiene.py`). Our choice: a sidecar and not columns of the pool, so that pools of before stay valid and the step
can be run again whenever pools grow. Near-duplicates are a column of their own beside `prompt_group`, whose names other tables already carry.

Three passes. Each shard's texts become keys (a sidecar `text_keys`); tasks compare the keys of all pools, by prompt group for cycles and by bands of
hashes for near-duplicates; each shard then reads its marks. A comparing task reads every shard's keys and holds some of its pairs' (36 bytes a pair
for cycles, below 1 GB with what sorts them; for near-duplicates 16 bytes a pair and three times that to sort, 2.5 GB at 40M pairs, and 120 bytes for
each pair whose prompt shares a band with another prompt); the links of near-duplicates, 16 bytes each, go through one task. Every worker that marks
shards holds the clusters (16 bytes for each prompt group in one) and the places of pairs in cycles (8 bytes and the pool's name each).

The driver holds lists of shards and counts, and nothing that stays for each pair: to count, it reads languages, findings of personal data and lengths
of one shard after the other. Only pools of at most 20,000 pairs together are compared and marked in the driver itself, which then holds what
tasks and workers hold.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.errors import ConfigError
from synpref_ray.ingest.hygiene import (
    BAND_COLUMNS,
    MINHASH_SEED,
    NUM_BANDS,
    NUM_HASHES,
    PAIR_FACTS,
    SHINGLE_WORDS,
    TEXT_KEYS_SCHEMA,
    Clusters,
    Links,
    find_clusters,
    find_links,
    group_name,
    in_cycle,
    shared_buckets,
    text_keys,
)
from synpref_ray.ingest.source import Route
from synpref_ray.ingest.token_lengths import tokenizer_file
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.pair_facts import PiiConfig, measure_pools, scan_pools
from synpref_ray.pipeline.steps import INLINE_ROWS, Output, ShardKey, Step, StepInput, run_step
from synpref_ray.pipeline.tasks import run_tasks
from synpref_ray.reporting.histograms import format_histogram, length_bars
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.schema import HYGIENE_SCHEMA
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, list_pools, open_pool
from synpref_ray.tables.prompt_clusters import clusters_path
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import versions_of

HYGIENE_VERSION = 1
MAX_PAIRS_PER_PART = 4_000_000  # ours: some 750 MB in a cycle task (2M pairs: 364 MB and 9 CPU seconds)
MAX_BANDS_OF_PAIRS = 20_000_000  # ours: pairs times bands of a near-duplicate task, unless one band has more; 16 bytes each

CYCLES_SCHEMA = pa.schema([("pool", pa.string()), ("shard", pa.int32()), ("row", pa.int32())])
LINKS_SCHEMA = pa.schema([("first", pa.uint64()), ("second", pa.uint64())])
CLUSTERS_SCHEMA = pa.schema([("group_key", pa.uint64()), ("cluster_key", pa.uint64())])


class HygieneConfig(JobConfig):
    """Which pools are looked at together, and what counts as a near-duplicate."""

    pools: tuple[str, ...] = ()
    """Names of pools; none means those of seed, unverified and wild that there are."""
    min_similarity: float = Field(default=0.8, gt=0.0, le=1.0)  # ours: the customary threshold for MinHash over word shingles
    pii: PiiConfig = PiiConfig()
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # ours: the bundled one; of token lengths, empty for none


def check_hygiene(config: HygieneConfig) -> None:
    """Check that the pools and the tokenizer are there."""
    _open_pools(config)
    if config.tokenizer:
        tokenizer_file(config.tokenizer)


def _open_pools(config: HygieneConfig) -> list[Pool]:
    names = config.pools or tuple(route.value for route in Route if route.value in list_pools(config.storage))
    if len(set(names)) != len(names):
        raise ConfigError(f"pools: {', '.join(names)}: each pool once")
    return [open_pool(config.storage, name) for name in names or (Route.SEED.value,)]


def run_hygiene(config: HygieneConfig, run: Run) -> str:
    """Make the sidecars `hygiene`, `pii` and `token_lengths` of every pool; return the closing table."""
    pools = _open_pools(config)
    keys = _make_keys(pools, run)
    compared = _compare(config, keys, run)
    marked = _make_hygiene(pools, keys, compared, run)
    if config.pii.scan:
        scan_pools(pools, config.pii, run)
    if config.tokenizer:
        measure_pools(pools, config.tokenizer, run)
    return _closing_table(marked, run)


class KeysWorker:
    """Turns texts into keys."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return text_keys(shard), {}


def _make_keys(pools: Sequence[Pool], run: Run) -> list[Sidecar]:
    step = Step(
        name="text_keys",
        version=HYGIENE_VERSION,
        worker=KeysWorker,
        outputs=(Output("text_keys", TEXT_KEYS_SCHEMA),),
        settings={
            "hashes": [NUM_HASHES, NUM_BANDS, SHINGLE_WORDS, MINHASH_SEED],
            "versions": versions_of("datasketch", "py3langid"),
        },
    )
    result = run_step(step, [StepInput(pool, ("prompt_group", "prompt", "chosen", "rejected")) for pool in pools])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    return [outputs[0] for outputs in result.sidecars]


@dataclass(frozen=True)
class Compared:
    """What comparing the pairs of all pools found; `name` is the fingerprint of everything that determines it."""

    storage: Storage
    name: str

    @property
    def folder(self) -> str:
        """Path under the workspace."""
        return f"hygiene/{self.name[:8]}"

    @property
    def is_done(self) -> bool:
        """Whether all of it is there."""
        return self.storage.exists(f"{self.folder}/done.json")

    def counts(self) -> dict[str, int]:
        """How many groups, links, clusters and pairs in cycles there are."""
        counts: dict[str, int] = self.storage.read_json(f"{self.folder}/done.json")["counts"]
        return counts

    def clusters(self) -> Clusters:
        """Return the prompt groups that have near-duplicates."""
        table = self.storage.read_table(clusters_path(self.name))
        return Clusters(table["group_key"].to_numpy(), table["cluster_key"].to_numpy())

    def cycles(self) -> pa.Table:
        """Return the places of all pairs in cycles."""
        return self._read_all("cycles", CYCLES_SCHEMA)

    def links(self) -> Links:
        """Return what the tasks linked."""
        table = self._read_all("links", LINKS_SCHEMA)
        return Links(table["first"].to_numpy(), table["second"].to_numpy())

    def _read_all(self, kind: str, schema: pa.Schema) -> pa.Table:
        paths = sorted(path for path in self.storage.list_files(self.folder) if path.startswith(f"{self.folder}/{kind}-"))
        return pa.concat_tables([schema.empty_table(), *(self.storage.read_table(path) for path in paths)])


def _compare(config: HygieneConfig, keys: Sequence[Sidecar], run: Run) -> Compared:
    started = time.monotonic()
    rows = sum(sidecar.pool.num_rows for sidecar in keys)
    inputs = {sidecar.pool.name: sidecar.fingerprint for sidecar in keys}
    settings = {"min_similarity": config.min_similarity, "versions": versions_of("scipy")}
    compared = Compared(config.storage, fingerprint("hygiene-compare", HYGIENE_VERSION, settings, inputs))
    computed = 0
    if not compared.is_done:
        with Lease(config.storage, f"{compared.folder}/lease.json") as lease:
            parts = max(1, -(-rows // MAX_PAIRS_PER_PART))
            bands = max(1, min(NUM_BANDS, MAX_BANDS_OF_PAIRS // max(rows, 1)))
            tasks: list[Any] = [_FindCycles(compared, part, parts) for part in range(parts)]
            tasks += [_FindLinks(compared, BAND_COLUMNS[start : start + bands], config.min_similarity) for start in range(0, NUM_BANDS, bands)]
            inline = rows <= INLINE_ROWS
            run_tasks(_call, tuple(keys), [(task,) for task in tasks], inline=inline, title="compare")
            (counts,) = run_tasks(_call, (), [(_FindClusters(compared),)], inline=inline)
            lease.check()
            config.storage.write_json(f"{compared.folder}/done.json", {"name": compared.name, "pools": inputs, **settings, "counts": counts})
        computed = rows
    run.step("hygiene_compare", rows=rows, computed=computed, rejected={}, seconds=time.monotonic() - started)
    return compared


def _call(keys: tuple[Sidecar, ...], task: Any) -> Any:
    return task(keys)


@dataclass(frozen=True)
class _FindCycles:
    """Writes the places of the pairs in cycles, of the prompt groups whose key leaves `part` when divided by `parts`."""

    compared: Compared
    part: int
    parts: int

    def __call__(self, keys: tuple[Sidecar, ...]) -> None:
        path = f"{self.compared.folder}/cycles-{self.part:05d}.parquet"
        if self.compared.storage.exists(path):
            return
        values, places = [], []
        for table, sidecar in enumerate(keys):
            for shard in sidecar.pool.shards:
                columns = _columns(sidecar, shard.number, ["group_key", "chosen_key", "rejected_key"])
                rows = np.flatnonzero(columns[:, 0] % np.uint64(self.parts) == self.part)
                values.append(columns[rows])
                places.append(np.stack([np.full(len(rows), table), np.full(len(rows), shard.number), rows], axis=1).astype(np.int32))
        found = CYCLES_SCHEMA.empty_table()
        if values:
            pairs = np.concatenate(values)
            marked = np.concatenate(places)[in_cycle(pairs[:, 0], pairs[:, 1], pairs[:, 2])]
            names = np.array([sidecar.pool.name for sidecar in keys], object)[marked[:, 0]]
            found = pa.table([pa.array(names, pa.string()), marked[:, 1], marked[:, 2]], schema=CYCLES_SCHEMA)
        self.compared.storage.write_table(path, found)


@dataclass(frozen=True)
class _FindLinks:
    """Writes the near-duplicates that share one of some bands; two readings, so that only prompts that meet another are held whole."""

    compared: Compared
    bands: tuple[str, ...]
    min_similarity: float

    def __call__(self, keys: tuple[Sidecar, ...]) -> None:
        path = f"{self.compared.folder}/links-{self.bands[0]}.parquet"
        if self.compared.storage.exists(path):
            return
        shards = [(sidecar, shard.number) for sidecar in keys for shard in sidecar.pool.shards]
        groups, bands, sizes = [], [], []
        for sidecar, number in shards:
            table = sidecar.read(number, ["group_key", "signature", *self.bands])
            rows = np.flatnonzero(table["signature"].is_valid().to_numpy())
            sizes.append(len(rows))
            groups.append(table["group_key"].to_numpy()[rows])
            bands.append(np.stack([table[name].fill_null(0).to_numpy()[rows] for name in self.bands], axis=1))
        links = Links(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        if groups:
            links = self._link(shards, sizes, np.concatenate(groups), np.concatenate(bands))
        self.compared.storage.write_table(path, pa.table(list(links), schema=LINKS_SCHEMA))

    def _link(self, shards: Sequence[tuple[Sidecar, int]], sizes: Sequence[int], groups: Any, bands: Any) -> Links:
        """Link (N,) groups by (N, B) bands; row n is the n-th pair that has a signature."""
        met = [shared_buckets(bands[:, number], groups) for number in range(bands.shape[1])]
        wanted = np.unique(np.concatenate(met))
        read = [np.zeros((0, NUM_HASHES), np.uint8)]
        ends = np.cumsum(sizes)
        for (sidecar, number), start, end in zip(shards, ends - sizes, ends, strict=True):
            first, last = np.searchsorted(wanted, [start, end])
            read.append(self._signatures(sidecar, number, wanted[first:last] - start))
        signatures = np.concatenate(read)
        found = []
        for number, places in enumerate(met):
            found.append(find_links(bands[places, number], groups[places], signatures[np.searchsorted(wanted, places)], self.min_similarity))
        pairs = np.unique(np.concatenate([np.stack(links, axis=1) for links in found]), axis=0)
        return Links(pairs[:, 0], pairs[:, 1])

    def _signatures(self, sidecar: Sidecar, number: int, rows: Any) -> Any:
        if not len(rows):
            return np.zeros((0, NUM_HASHES), np.uint8)
        column = sidecar.read(number, ["signature"])["signature"].drop_null()
        return np.frombuffer(b"".join(column.take(pa.array(rows)).to_pylist()), np.uint8).reshape(-1, NUM_HASHES)


@dataclass(frozen=True)
class _FindClusters:
    """Writes the clusters that all links make, and counts."""

    compared: Compared

    def __call__(self, _: tuple[Sidecar, ...]) -> dict[str, int]:
        links = self.compared.links()
        clusters = find_clusters(links)
        self.compared.storage.write_table(clusters_path(self.compared.name), pa.table(list(clusters), schema=CLUSTERS_SCHEMA))
        return {
            "pairs_in_cycles": self.compared.cycles().num_rows,
            "near_duplicate_clusters": len(np.unique(clusters.names)),
            "prompt_groups_in_clusters": len(clusters.groups),
        }


def _columns(sidecar: Sidecar, number: int, names: list[str]) -> Any:
    table = sidecar.read(number, names)
    return np.stack([table[name].to_numpy() for name in names], axis=1)


class HygieneWorker:
    """Puts what was found about a shard's pairs beside what their texts say."""

    def __init__(self, compared: Compared, pools: tuple[str, ...]):
        self._compared = compared
        self._pools = pools

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        clusters, cycles = _found(self._compared)
        mine = pc.and_(pc.equal(cycles["pool"], self._pools[key.table]), pc.equal(cycles["shard"], key.number))
        marked = np.zeros(shard.num_rows, np.bool_)
        marked[cycles["row"].filter(mine).to_numpy()] = True
        names = [group_name(name) for name in clusters.name_groups(shard["group_key"].to_numpy()).tolist()]
        facts = [shard[field.name] for field in PAIR_FACTS]
        return pa.table([shard["pair_id"], *facts, pa.array(marked), pa.array(names, pa.string())], schema=HYGIENE_SCHEMA), {}


@lru_cache(maxsize=1)
def _found(compared: Compared) -> tuple[Clusters, pa.Table]:
    """Return what a process marks its shards with, read once."""
    return compared.clusters(), compared.cycles()


def _make_hygiene(pools: Sequence[Pool], keys: Sequence[Sidecar], compared: Compared, run: Run) -> list[Sidecar]:
    names = tuple(pool.name for pool in pools)
    step = Step(
        name="hygiene",
        version=HYGIENE_VERSION,
        worker=HygieneWorker,
        outputs=(Output("hygiene", HYGIENE_SCHEMA),),
        settings={},
        digests={"compared": compared.name},
        worker_arguments=lambda _: {"compared": compared, "pools": names},
    )
    columns = {name: name for name in (*(field.name for field in PAIR_FACTS), "group_key")}
    result = run_step(step, [StepInput(pool, (), ((sidecar, columns),)) for pool, sidecar in zip(pools, keys, strict=True)])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    run.metrics["hygiene"] = {pool.name: outputs[0].fingerprint for pool, outputs in zip(pools, result.sidecars, strict=True)}
    run.metrics.update(compared.counts())
    return [outputs[0] for outputs in result.sidecars]


def _closing_table(tables: Sequence[Sidecar], run: Run) -> str:
    languages: Counter[str] = Counter()
    for table in tables:
        for shard in table.pool.shards:
            counts = pc.value_counts(table.read(shard.number, ["language"])["language"]).to_pylist()
            languages.update({entry["values"] or "none": entry["counts"] for entry in counts})
    run.metrics["languages"] = dict(sorted(languages.items()))
    rows = [(f"pairs, {table.pool.name}", str(table.pool.num_rows)) for table in tables]
    rows += [(f"pairs, language {name}", str(count)) for name, count in sorted(languages.items(), key=lambda item: (-item[1], item[0]))[:5]]
    rows += [(name.replace("_", " "), str(run.metrics[name])) for name in ("pairs_in_cycles", "near_duplicate_clusters", "prompt_groups_in_clusters")]
    tables_of_facts = [
        format_table(("what", "count"), rows),
        *_pii_table(run.metrics.get("pii", {})),
        *_length_lines(run.metrics.get("token_lengths", {})),
    ]
    return "\n\n".join(tables_of_facts)


def _pii_table(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line a source: pairs that hold personal data, by the highest score."""
    if not counts:
        return []
    names = ("pairs", *(f"score_{score}" for score in range(4)), "not_scanned_whole")
    rows = [(source, *(str(found.get(name, 0)) for name in names)) for source, found in counts.items()]
    return [format_table(("personal data (docs/sources.md)", *(name.replace("_", " ") for name in names)), rows)]


def _length_lines(lengths: Mapping[str, Any]) -> list[str]:
    parts = []
    for pool, histograms in lengths.items():
        if pool != "tokenizer":
            parts += [f"{name.replace('_', ' ')}, {pool}\n{format_histogram(length_bars(bars))}" for name, bars in histograms.items()]
    return parts
