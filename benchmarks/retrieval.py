"""Retrieval from a large pool: codes and exact scores (OPQ + IVF-PQ) against the exact index; recall, bytes, build time, queries/s, memory.

    python -m benchmarks.retrieval --out retrieval.json

Seeded vectors (`_retrieval_data.py` says how they lie) are written as a pool with its embeddings, as a workspace holds them; queries are further
draws of the same mixture, and each excludes a prompt group. Each side of each size is a process of its own. The codes' side is `build_pool_index` and
its search over a local Ray, as Stage 1 runs it: training, parts, merge, then candidates from an actor and exact scores from the stored shards. The
exact side reads the whole pool into one process and builds `PairIndex`. Both sides give their eight nearest pairs; recall is the share of the exact
ones that the codes' side found. Build times include reading, and writing the index.

All sides have the same cores, as many as `--threads`.

The table for 40 million scales each phase by its own work: training by lists squared (the sample is a number of vectors for every list), filling by
vectors and lists, merging by vectors, a search by lists and codes scanned. The cost of a unit is the slope between the smallest and the largest size,
or, with one size, all of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._common import Gate, finish, machine, mib, parser, table
from benchmarks._ingest_sides import DRIVER, WORKER, Watcher
from benchmarks._retrieval_data import make_pool, make_queries
from synpref_ray.pipeline.cluster import RayConfig, ray_session
from synpref_ray.pipeline.pool_index import build_pool_index
from synpref_ray.pipeline.retrieval import read_embedded
from synpref_ray.retrieval.index import IndexConfig, PairIndex
from synpref_ray.retrieval.neighbours import NeighbourSearch
from synpref_ray.retrieval.quantised import LeftOut
from synpref_ray.tables.storage import Storage

DATA, EXACT, CODES = "data", "exact", "codes"
K = 8
MIN_RECALL, MAX_BYTES = 0.95, 64
FULL_SIZE = 1_000_000  # from here on lists and rotation count among the bytes of a vector
TARGET, TARGET_CORES = 40_000_000, (2, 16, 64, 256)


def settings(arguments: argparse.Namespace) -> IndexConfig:
    """Return the index under test: the defaults, but for what the command line says."""
    return IndexConfig(kind="ivf_pq", num_threads=arguments.threads, m=arguments.m, nlist=arguments.nlist, nprobe=arguments.nprobe)


def timed_search(index: NeighbourSearch, queries: Any, rounds: int) -> tuple[list[list[str]], list[float]]:
    """Return each query's neighbours and the seconds of every round; the first one, which loads and warms, is not counted."""
    groups = [f"query {row}" for row in range(len(queries))]
    index.search(queries[:1], K, exclude_groups=groups[:1])
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        found = index.search(queries, K, exclude_groups=groups)
        seconds.append(time.perf_counter() - began)
    return found.ids, seconds


def run_side(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one side in this process, which is fresh, and return what it measured."""
    if hasattr(os, "sched_setaffinity"):  # Ray's processes inherit it; more tasks than cores then share these
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    storage, size = Storage(str(arguments.work)), int(arguments.pairs)
    pool, embeddings = make_pool(storage, size, arguments.dimension, arguments.seed)
    if side == DATA:
        return {"shards": len(pool.shards)}
    queries = make_queries(size, arguments.dimension, arguments.seed, arguments.queries)
    watcher = Watcher(("ray::",))
    watcher.start()
    began = time.perf_counter()
    if side == EXACT:
        exact = PairIndex.build(read_embedded(pool, embeddings), IndexConfig(num_threads=arguments.threads))
        build = {"build": time.perf_counter() - began}
        ids, seconds = timed_search(exact, queries, arguments.rounds)
        return {"build": build, "search": seconds, "ids": ids, "bytes": 4 * arguments.dimension * size, "peaks": watcher.stop()}
    with ray_session(RayConfig(num_cpus=max(8, arguments.threads), dashboard=False), storage):
        index = build_pool_index(pool, embeddings, settings(arguments))
        manifest = storage.read_json(f"{index.folder}/manifest.json")
        with index.opened(LeftOut()) as opened:
            ids, seconds = timed_search(opened, queries, arguments.rounds)
        peaks = watcher.stop()
    shape = index.shape
    work = {
        "train": float(shape.nlist**2),
        "fill": float(size * shape.nlist),
        "merge": float(size),
        "search": shape.nlist + size / shape.nlist * shape.nprobe,
    }
    build = dict(manifest["seconds_by_phase"])
    return {"build": build, "search": seconds, "ids": ids, "bytes": manifest["bytes"], "peaks": peaks, "work": work, "factory": shape.factory,
            "nprobe": shape.nprobe, "code_bytes": shape.m + 8}  # fmt: skip


def start_side(side: str, size: int, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own."""
    options = ["--side", side, "--pairs", str(size), "--work", str(work)]
    for name in ("dimension", "queries", "seed", "threads", "rounds", "m", "nlist", "nprobe"):
        options += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-m", "benchmarks.retrieval", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} with {size} pairs ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def recall(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Return the share of the wanted neighbours that were found, the mean over queries."""
    return float(np.mean([len({*ours} & {*theirs}) / len(theirs) for ours, theirs in zip(found, wanted, strict=True)]))


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run both sides of every size."""
    results: dict[str, Any] = {}
    for size in [int(size) for size in arguments.pairs.split(",")]:
        folder = work / f"{size}-{arguments.dimension}-{arguments.seed}"
        start_side(DATA, size, folder, arguments)
        sides = {side: start_side(side, size, folder, arguments) for side in (EXACT, CODES)}
        found, wanted = sides[CODES].pop("ids"), sides[EXACT].pop("ids")
        results[str(size)] = {**sides, "recall": recall(found, wanted)}
        print(f"{size} pairs: recall {results[str(size)]['recall']:.4f}", flush=True)
    return results


def unit_costs(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of one unit of each phase's work (a search's: for one query): the slope between the sizes, or all of it with one."""
    sizes = list(results)
    first, last = results[sizes[0]][CODES], results[sizes[-1]][CODES]
    costs = {}
    for phase in ("train", "fill", "merge", "search"):
        first_seconds, last_seconds = (median(one["search"]) if phase == "search" else one["build"][phase] for one in (first, last))
        more = last["work"][phase] - first["work"][phase]
        slope = (last_seconds - first_seconds) / more if more else 0.0
        costs[phase] = slope if slope > 0 else last_seconds / last["work"][phase]
    return costs


def index_bytes(results: Mapping[str, Any], num_pairs: int) -> float:
    """Return the bytes of an index over `num_pairs`, which merging and searching hold whole.

    By the slope between the sizes, or in proportion with one.
    """
    sizes = list(results)
    small, large = int(sizes[0]), int(sizes[-1])
    first, last = (float(results[size][CODES]["bytes"]) for size in (sizes[0], sizes[-1]))
    slope = (last - first) / (large - small) if large > small else last / large
    return last + slope * (num_pairs - large)


def forecast(results: Mapping[str, Any], arguments: argparse.Namespace, num_pairs: int = TARGET) -> list[dict[str, float]]:
    """Return how long building and searching an index over `num_pairs` takes, by the number of cores like these.

    Training, merging and a search's codes run on one node, by at most 64 of its cores; parts are filled on all.
    """
    shape = settings(arguments).shape(num_pairs, arguments.dimension)
    costs = unit_costs(results)
    scanned = shape.nlist + num_pairs / shape.nlist * shape.nprobe
    rows = []
    for cores in TARGET_CORES:
        share, whole = arguments.threads / min(64, cores), arguments.threads / cores
        parts = {
            "train": costs["train"] * shape.nlist**2 * share,
            "fill": costs["fill"] * num_pairs * shape.nlist * whole,
            "merge": costs["merge"] * num_pairs,
            "query": costs["search"] * scanned / arguments.queries * share,
        }
        rows.append({"cores": cores, "bytes": index_bytes(results, num_pairs), **parts, "build": parts["train"] + parts["fill"] + parts["merge"]})
    return rows


def report(results: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """Return the tables."""
    rows, builds = [], []
    for size, one in results.items():
        for side in (EXACT, CODES):
            measured = one[side]
            found = "1" if side == EXACT else f"{one['recall']:.4f}"
            speed = arguments.queries / median(measured["search"])
            memory = [mib(measured["peaks"][DRIVER]), mib(measured["peaks"][WORKER])]
            seconds = sum(measured["build"].values())
            rows.append([size, side, found, f"{measured['bytes'] / int(size):.1f}", f"{seconds:.1f}", f"{speed:.1f}", *memory])
        phases = one[CODES]["build"]
        builds.append([size, one[CODES]["factory"], str(one[CODES]["nprobe"]), *(f"{phases[name]:.1f}" for name in ("train", "fill", "merge"))])
    ahead = [
        [
            f"{one['cores']:.0f}",
            *(f"{one[name] / 60:.1f}" for name in ("train", "fill", "merge", "build")),
            f"{1 / one['query']:.1f}",
            f"{one['bytes'] / 2**30:.2f}",
        ]
        for one in forecast(results, arguments)
    ]
    header = ["pairs", "side", f"recall@{K}", "bytes a vector", "build, s", "queries/s", "driver, peak MiB", "greatest worker, peak MiB"]
    tables = [
        table(header, rows),
        table(["pairs", "index", "lists probed", "train, s", "fill, s", "merge, s"], builds),
        table([f"cores for {TARGET:,}", "train, min", "fill, min", "merge, min", "build, min", "queries/s", "index, GiB"], ahead),
    ]
    return "\n\n".join(tables)


def gates_of(results: Mapping[str, Any]) -> list[Gate]:
    """Return the gates, all on the largest size."""
    size, last = list(results.items())[-1]
    gates = [
        Gate(f"{size} pairs: recall@{K} against exact", last["recall"], MIN_RECALL),
        Gate(f"{size} pairs: bytes of a code with its row number", last[CODES]["code_bytes"], MAX_BYTES, most=True),
    ]
    if int(size) >= FULL_SIZE:
        gates.append(Gate(f"{size} pairs: bytes of the whole index / vectors", last[CODES]["bytes"] / int(size), MAX_BYTES, most=True))
    return gates


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's text."""
    made = parser(__doc__)
    made.add_argument("--pairs", default="250000,1000000", help="sizes, by comma, the largest last")
    made.add_argument("--dimension", type=int, default=384)
    made.add_argument("--queries", type=int, default=1000)
    made.add_argument("--rounds", type=int, default=3, help="searches of all queries; the median counts")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--m", type=int, default=IndexConfig().m, help="bytes of a code")
    made.add_argument("--nlist", type=int, default=0, help="inverted lists; 0: by the config's rule")
    made.add_argument("--nprobe", type=int, default=0, help="lists probed; 0: by the config's rule")
    made.add_argument("--work", type=Path, help="folder for the data, some 2 GB a million pairs of 384 numbers; default: a temporary one")
    made.add_argument("--side", choices=(DATA, EXACT, CODES), help="run this side in this process and print JSON; what the benchmark does itself")
    arguments = made.parse_args(argv)
    if arguments.side is not None:
        print(json.dumps(run_side(arguments.side, arguments)))
        return 0
    described = machine()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            results = measure(arguments, arguments.work or Path(temporary))
        except (OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print("\n" + report(results, arguments))
    whole = {"machine": described, "sizes": results, "forecast": forecast(results, arguments)}
    return finish("retrieval", whole, gates_of(results), [], arguments)


if __name__ == "__main__":
    sys.exit(main())
