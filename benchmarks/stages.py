"""Stage 2 with stand-ins for the models: what the system itself costs, in time and memory, against Ray's bare read, actor and write.

    python -m benchmarks.stages --out stages.json

For each size a fresh process makes a workspace (`_stage_models.py`: rows of 2.3 KB on average, three mismatches in ten pairs, gold) in other
processes, starts a local Ray and runs `run_stage2` whole, as jobs/stage2.py does, with everything real but the models. Then it runs it again with
another flip bar, which derives new decisions from stored rewards and votes. Reported are pairs/s by step and the peaks of the driver, of the greatest
worker and of the object store.

Over the smallest size, in the same process and in turn, the scoring step (the one that streams a whole pool through model actors) runs against a bare
Ray Data pipeline: `read_parquet` of the same columns of the same shards, the same stand-in in as many actors, `write_parquet`. Ours lists, leases,
checks every pair_id, writes each shard atomically to the disk, counts, and seals two tables; the bare one does none of it. The first round of each is
not counted.

The hours for 40M are the pairs' own and grow with them alone: what grows with gold too, the exact search for exemplars first, is measured by running
this again with `--gold`.

The scheduling cost is that of the same step over shards of a few rows, in seconds a shard, with the bare pipeline beside it, which
reads many small files as one block (`read_parquet` merges them).
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.data import ActorPoolStrategy

from benchmarks._common import Gate, Stopwatch, finish, interleave, machine, mib, parser, table
from benchmarks._ingest_sides import DRIVER, WORKER, Watcher
from benchmarks._stage_models import StandInScorer, make_shard, stage2_config, stand_ins, write_stage1
from synpref_ray.pipeline.cluster import RayConfig, ray_session
from synpref_ray.pipeline.scoring import SCORE_COLUMNS, ScoreConfig, score_pools
from synpref_ray.pipeline.stage2 import run_stage2
from synpref_ray.pipeline.steps import ShardKey
from synpref_ray.reporting.run import Run
from synpref_ray.reward.parity_record import ParityConfig
from synpref_ray.tables.models import StoredModel
from synpref_ray.tables.pools import Pool, commit_pool, open_pool, shard_path
from synpref_ray.tables.storage import Storage

OURS, BARE, STORE = "ours", "bare", "object store"
MAX_RATIO, MAX_GROWTH, MIN_DECISIONS_PER_MINUTE = 1.5, 1.15, 1e6
ROWS_OF_SMALL_SHARD = 24
TARGET = 40_000_000


class StoreWatcher(threading.Thread):
    """Keeps the greatest use of Ray's object store."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        state = get_state_from_address(None)  # type: ignore[no-untyped-call]  # of Ray
        while not self._done.wait(2.0):
            self.peak = max(self.peak, get_memory_info_reply(state).store_stats.object_store_bytes_used)  # type: ignore[no-untyped-call]

    def stop(self) -> int:
        """Stop, and return the peak."""
        self._done.set()
        self.join()
        return self.peak


def make_pool(storage: Storage, name: str, num_pairs: int, pairs_per_shard: int, seed: int) -> None:
    """Write a synthetic pool by all cores."""
    sizes = [min(pairs_per_shard, num_pairs - first) for first in range(0, num_pairs, pairs_per_shard)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
        calls = [processes.submit(make_shard, storage, name, seed, number, count) for number, count in enumerate(sizes)]
        shards = [call.result() for call in calls]
    commit_pool(storage, name, "synthetic", shards, {})


def make_workspace(storage: Storage, num_pairs: int, pairs_per_shard: int, num_gold: int, seed: int) -> None:
    """Write the pool and Stage 1's results."""
    make_pool(storage, "wild", num_pairs, pairs_per_shard, seed)
    write_stage1(storage, num_gold, seed)


def elsewhere(function: Any, *arguments: Any) -> None:
    """Call a function in a fresh process, so that this one, the driver, holds nothing of it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")


def measure_size(arguments: Any, folder: Path) -> dict[str, Any]:
    """Run Stage 2 over one size in this process, which is fresh, twice, and then, if asked, against the bare pipeline."""
    storage, size = Storage(str(folder / "workspace")), int(arguments.rows)
    elsewhere(make_workspace, storage, size, arguments.pairs_per_shard, arguments.gold, arguments.seed)
    result: dict[str, Any] = {"rows": size, "gold": arguments.gold}
    with ray_session(RayConfig(dashboard=False), storage), stand_ins():
        watcher, store = Watcher(("ray::",)), StoreWatcher()
        watcher.start()
        store.start()
        pool = open_pool(storage, "wild")
        result["shards"] = len(pool.shards)
        result["stage2"] = timed_stage2(storage, arguments.workers)
        result["peaks"] = {**watcher.stop(), STORE: store.stop()}
        result["again"] = timed_stage2(storage, arguments.workers, gate={"min_flip_confidence": 0.55})
        if arguments.rounds:
            result["bare"] = against_bare(pool, arguments.workers, arguments.rounds, folder / "bare")
    result["bytes_a_row"] = text_bytes(pool) / size
    return result


def timed_stage2(storage: Storage, workers: int, **changes: Any) -> dict[str, Any]:
    """Run Stage 2 and return its seconds, whole and by step, and what it decided."""
    config = stage2_config(storage, workers, **changes)
    run = Run(storage, "stage2", config)
    began = time.perf_counter()
    run_stage2(config, run)
    seconds = time.perf_counter() - began
    by_step = {step["step"]: step["seconds"] for step in run.steps}
    sent = sum(step.get("requests_sent", 0) for step in run.steps)
    scored = next(step["computed"] for step in run.steps if step["step"] == "score, both RMs")
    found = run.metrics["stage2"]
    return {
        "seconds": seconds,
        "steps": by_step,
        "requests": sent,
        "scored": scored,
        "decisions": found["decisions"],
        "judged": found["judged_pairs"],
    }


def text_bytes(pool: Pool) -> float:
    """Return how many bytes of prompt and replies a pool has, from its first shard."""
    first = pool.read(pool.shards[0].number, list(SCORE_COLUMNS))
    return float(first.nbytes / first.num_rows * pool.num_rows)


class BareScorer:
    """The stand-in as Ray Data calls it."""

    def __init__(self) -> None:
        self._scorer = StandInScorer([("best.", ""), ("gold.", "")], ScoreConfig())

    def __call__(self, block: pa.Table) -> pa.Table:
        return self._scorer(block, ShardKey(0, 0))[0]


def score_ours(pool: Pool, workers: int) -> Mapping[str, Any]:
    """Run the scoring step anew; it says nothing but how long it took."""
    models = {name: StoredModel(pool.storage, name, name * 8) for name in ("best", "gold")}
    config = ScoreConfig(num_workers=workers)
    score_pools(Run(pool.storage, "score", config), "score", [pool], models, config, ParityConfig(enabled=False))
    for name in models:
        pool.storage.delete_folder(f"pools/{pool.name}/rewards.{name}")
    return {}


def score_bare(pool: Pool, workers: int, out: Path) -> Mapping[str, Any]:
    """Do the same with nothing but Ray Data."""
    files = [pool.storage.local_path(shard_path(f"pools/{pool.name}", shard.number)) for shard in pool.shards]
    dataset = ray.data.read_parquet(files, columns=["pair_id", *SCORE_COLUMNS], override_num_blocks=len(files))
    compute = ActorPoolStrategy(size=min(workers, len(files)))
    dataset.map_batches(BareScorer, batch_format="pyarrow", batch_size=None, compute=compute).write_parquet(str(out))
    shutil.rmtree(out)
    return {}


def against_bare(pool: Pool, workers: int, rounds: int, out: Path) -> dict[str, list[float]]:
    """Return the seconds of both, by round; the first round, in which actors' processes import, is not counted."""
    sides = {OURS: partial(score_ours, pool, workers), BARE: partial(score_bare, pool, workers, out)}
    measured = interleave(sides, rounds + 1, Stopwatch(), say=lambda line: print(line, file=sys.stderr))
    return {name: [one[name].seconds for one in measured[1:]] for name in sides}


def measure_shards(arguments: Any, folder: Path) -> dict[str, Any]:
    """Run the scoring step over as many small shards as asked, in this process, which is fresh, against the bare pipeline."""
    storage, num_shards = Storage(str(folder / "workspace")), int(arguments.shards)
    elsewhere(make_pool, storage, "small", num_shards * ROWS_OF_SMALL_SHARD, ROWS_OF_SMALL_SHARD, arguments.seed)
    with ray_session(RayConfig(dashboard=False), storage), stand_ins():
        pool = open_pool(storage, "small")
        return {"shards": num_shards, **against_bare(pool, arguments.workers, 1, folder / "bare")}


def start(what: str, value: int, arguments: Any, rounds: int) -> dict[str, Any]:
    """Measure one size, or one number of shards, in a process of its own."""
    options = [f"--{what}", str(value), "--one", what, "--rounds", str(rounds), "--workers", str(arguments.workers), "--seed", str(arguments.seed)]
    options += [
        "--gold",
        str(arguments.gold),
        "--pairs-per-shard",
        str(arguments.pairs_per_shard),
        *(["--work", str(arguments.work)] if arguments.work else []),
    ]
    done = subprocess.run([sys.executable, "-m", "benchmarks.stages", *options], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{value} {what} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ratio(bare: Mapping[str, Sequence[float]]) -> float:
    """Return how many times as long ours takes: the median of the rounds' own ratios."""
    return float(median(ours / theirs for ours, theirs in zip(bare[OURS], bare[BARE], strict=True)))


def decisions_per_minute(one: Mapping[str, Any]) -> float:
    """Return how many pairs a minute are decided anew."""
    return float(one["rows"] / one["again"]["seconds"] * 60)


def gates_of(sizes: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """Return the gates; memory only with more than one size."""
    first, last = sizes[0], sizes[-1]
    gates = [
        Gate(f"{first['rows']} rows: scoring step / bare Ray, time", ratio(first["bare"]), MAX_RATIO, most=True),
        Gate(f"{last['rows']} rows: decisions derived anew, a minute", decisions_per_minute(last), MIN_DECISIONS_PER_MINUTE),
    ]
    if len(sizes) > 1:
        growth = last["stage2"]["seconds"] / last["rows"] / (first["stage2"]["seconds"] / first["rows"])
        gates.append(Gate(f"overhead a pair at {last['rows']} / at {first['rows']} rows", growth, MAX_GROWTH, most=True))
        for process in (DRIVER, WORKER, STORE):
            growth = last["peaks"][process] / max(1, first["peaks"][process])
            gates.append(Gate(f"{process}'s peak at {last['rows']} / at {first['rows']} rows", growth, MAX_GROWTH, most=True))
    return gates


def wrong_of(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what came out wrong."""
    wrong = []
    for one in sizes:
        if sum(one["stage2"]["decisions"].values()) != one["rows"] or sum(one["again"]["decisions"].values()) != one["rows"]:
            wrong.append(f"{one['rows']} rows: not every pair was decided")
        if one["again"]["requests"] or one["again"]["scored"]:
            wrong.append(f"{one['rows']} rows: deriving decisions anew asked the models for {one['again']['requests']} replies")
        if one["bytes_a_row"] < 2048:
            wrong.append(f"{one['rows']} rows: {one['bytes_a_row']:.0f} bytes a row, fewer than 2 KB")
    return wrong


def report(sizes: Sequence[Mapping[str, Any]], shards: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables."""
    whole, by_step, memory = [], [], []
    for one in sizes:
        rows, seconds = one["rows"], one["stage2"]["seconds"]
        bare = f"{ratio(one['bare']):.2f}" if "bare" in one else ""
        days = TARGET * seconds / rows / 3600
        whole.append([str(rows), str(one["gold"]), f"{one['bytes_a_row']:.0f}",
                      f"{seconds:.1f}", f"{rows / seconds:.0f}", f"{1e6 * seconds / rows:.0f}", bare,
                      f"{decisions_per_minute(one):.0f}", f"{days:.1f}"])  # fmt: skip
        for name, took in one["stage2"]["steps"].items():
            by_step.append([str(rows), name, f"{took:.1f}", f"{1e6 * took / rows:.0f}", f"{one['again']['steps'].get(name, 0.0):.1f}"])
        memory.append([str(rows), *(mib(one["peaks"][name]) for name in (DRIVER, WORKER, STORE))])
    header = [
        "rows",
        "gold",
        "bytes a row",
        "Stage 2, s",
        "pairs/s",
        "overhead a pair, µs",
        "scoring step / bare",
        "decided anew a minute",
        "h for 40M here",
    ]
    tables = [
        table(header, whole),
        table(["rows", "step", "s", "µs a pair of the pool", "s the second time"], by_step),
        table(["rows", "driver, peak MiB", "greatest worker, peak MiB", "object store, peak MiB"], memory),
    ]
    if shards:
        rows = [[str(one["shards"]), *(f"{1e3 * median(one[side]) / one['shards']:.1f}" for side in (OURS, BARE))] for one in shards]
        tables.append(table(["shards", "ours, ms a shard", "bare Ray, ms a shard"], rows))
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's text."""
    made = parser(__doc__)
    made.add_argument("--rows", default="1000000,4000000", help="sizes of the pool, by comma, the smallest first")
    made.add_argument("--shards", default="100,1000,10000", help="numbers of small shards, by comma; empty: none")
    made.add_argument("--pairs-per-shard", type=int, default=8192)
    made.add_argument("--gold", type=int, default=256, help="gold pairs, whose search and prompts grow with them")
    made.add_argument("--workers", type=int, default=2, help="actors of every step that has a model")
    made.add_argument("--rounds", type=int, default=3, help="of the scoring step against bare Ray, over the smallest size")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", type=Path, help="folder for the workspaces, some 4 GB a million rows; default: a temporary one")
    made.add_argument("--one", choices=("rows", "shards"), help="measure this in this process and print JSON; what the benchmark does itself")
    arguments = made.parse_args(argv)
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one is not None:
        with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
            measured = (measure_size if arguments.one == "rows" else measure_shards)(arguments, Path(temporary))
        print(json.dumps(measured))
        return 0
    described = machine()
    try:
        sizes = [start("rows", int(size), arguments, arguments.rounds if not place else 0) for place, size in enumerate(arguments.rows.split(","))]
        shards = [start("shards", int(count), arguments, 1) for count in arguments.shards.split(",") if count]
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + report(sizes, shards))
    return finish("stages", {"machine": described, "sizes": sizes, "shards": shards}, gates_of(sizes), wrong_of(sizes), arguments)


if __name__ == "__main__":
    sys.exit(main())
