"""The sides of `ingest.py`, each for a process of its own that imports no more than it needs (no torch): our job over Ray, and plain Python.

The plain side is what one would write by hand for one machine: two processes share the files, call the very same functions for a row (readers,
structural filter, ids, 13-word search), keep the ids in memory, spill pairs as uncompressed Arrow, and write what is kept as Parquet. It writes no
rejects, digests no file, forces nothing to the disk, and can neither resume nor grow beyond one machine's memory.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from synpref_ray.ingest.benchmark_prompts import BenchmarkFile, DecontaminateConfig, read_benchmarks
from synpref_ray.ingest.chunk import count_reasons, read_staged, write_staged
from synpref_ray.ingest.decontamination import BenchmarkIndex, drop_contaminated, find_matches
from synpref_ray.ingest.duplicates import Ids, find_duplicates, parse_ids
from synpref_ray.ingest.readers import read_pair_file
from synpref_ray.ingest.source import SourceConfig
from synpref_ray.schema import POOL_SCHEMA

POLL_SECONDS = 0.2
DRIVER, WORKER = "driver", "worker"


class Watcher(threading.Thread):
    """Keeps the greatest resident memory of this process, and of each process below it whose title begins with `workers`."""

    def __init__(self, workers: tuple[str, ...]) -> None:
        super().__init__(daemon=True)
        self._workers = workers
        self._peaks: dict[int, int] = {}
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Look once: the kernel keeps the peaks, but only while a process lives."""
        self._note(os.getpid())
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if title.startswith(self._workers) or any(f" {name}" in title for name in self._workers):
                self._note(process.pid)

    def stop(self) -> dict[str, int]:
        """Return the peaks of the driver and of the worker that had the greatest."""
        self.look()
        self._done.set()
        self.join()
        others = [peak for pid, peak in self._peaks.items() if pid != os.getpid()]
        return {DRIVER: self._peaks[os.getpid()], WORKER: max(others, default=0)}

    def _note(self, pid: int) -> None:
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
        self._peaks[pid] = max(self._peaks.get(pid, 0), found)


def benchmarks_of(data: Path, *, candidates: bool) -> DecontaminateConfig:
    """Return the decontamination of both sides."""
    return DecontaminateConfig(benchmarks=(BenchmarkFile(path=str(data / "benchmark.json"), name="benchmark"),), candidates=candidates)


def ours(data: Path, work: Path, cpus: int, *, candidates: bool) -> dict[str, Any]:
    """Run the job's own body over a Ray of its own."""
    began = time.perf_counter()
    from synpref_ray.pipeline.cluster import RayConfig, ray_session
    from synpref_ray.pipeline.ingest import run_ingest
    from synpref_ray.pipeline.ingest_sources import IngestConfig
    from synpref_ray.pipeline.tasks import run_tasks
    from synpref_ray.reporting.run import Run
    from synpref_ray.tables.pools import open_pool

    config = IngestConfig(
        data=str(data / "pairs"),
        workspace=str(work),
        decontaminate=benchmarks_of(data, candidates=candidates),
        ray=RayConfig(num_cpus=cpus, dashboard=False),
    )
    times = {"import": time.perf_counter() - began}
    watcher = Watcher(("ray::",))
    mark = time.perf_counter()
    with ray_session(config.ray, config.storage):
        times["start Ray"], mark = time.perf_counter() - mark, time.perf_counter()
        run_tasks(_import_ingest, None, [()] * cpus)
        times["start workers"], mark = time.perf_counter() - mark, time.perf_counter()
        watcher.start()
        run = Run(config.storage, "ingest", config)
        run_ingest(config, run)
        times["ingest"], mark = time.perf_counter() - mark, time.perf_counter()
        peaks = watcher.stop()
    times["stop Ray"] = time.perf_counter() - mark
    metrics, pool = run.metrics, open_pool(config.storage, "wild")
    digest = hashlib.blake2b(digest_size=16)
    for shard in pool.shards:
        digest.update("".join(pool.read(shard.number, ["pair_id"])["pair_id"].to_pylist()).encode())
    rejected = dict(metrics["rejected"])
    found = {"rows": metrics["rows_read"], "kept": metrics["pools"]["wild"], "contradicted": metrics["contradicted"]["wild"]}
    found |= {"duplicates": rejected.pop("duplicate"), "contaminated": rejected.pop("contaminated", 0), "broken": rejected}
    return {"found": found, "pairs": digest.hexdigest(), "times": times, "phases": metrics["phase_seconds"], "peaks": peaks}


def _import_ingest(_: None) -> None:
    """Let a worker import what its first task needs."""
    import synpref_ray.pipeline.ingest  # noqa: F401

    time.sleep(0.1)  # so that every worker gets one of these


_index: BenchmarkIndex | None = None


def plain(data: Path, work: Path, cpus: int, *, candidates: bool) -> dict[str, Any]:
    """Do the same without Ray: two passes of a pool of processes, all ids in this one."""
    began = time.perf_counter()
    files = sorted((data / "pairs").iterdir())
    (work / "spill").mkdir(parents=True)
    (work / "pool").mkdir()
    watcher = Watcher(("multiprocessing",))
    watcher.start()
    phases = {}
    rejected: Counter[str] = Counter()
    with get_context("spawn").Pool(cpus, _prepare, (str(data), candidates)) as pool:
        staged = pool.map(_stage, [(str(file), str(work / "spill" / file.stem)) for file in files], chunksize=1)
        phases["read"], mark = time.perf_counter() - began, time.perf_counter()
        no_ids = np.empty((0, 2), np.uint64)
        found = find_duplicates(np.concatenate([no_ids, *(entry[1] for entry in staged)]), np.concatenate([no_ids, *(entry[2] for entry in staged)]))
        phases["compare"], mark = time.perf_counter() - mark, time.perf_counter()
        ends = np.cumsum([len(entry[1]) for entry in staged]).tolist()
        tasks = []
        for file, entry, end in zip(files, staged, ends, strict=True):
            part = slice(end - len(entry[1]), end)
            tasks.append((str(work / "spill" / file.stem), str(work / "pool" / file.stem), entry[0], found.keep[part], found.contradicted[part]))
            rejected.update(entry[4])
        digests = pool.map(_write, tasks, chunksize=1)
        phases["write"] = time.perf_counter() - mark
    peaks = watcher.stop()
    rows = sum(entry[3] for entry in staged)
    contaminated = rejected.pop("contaminated", 0)
    counts: dict[str, Any] = {"rows": rows, "kept": int(found.keep.sum()), "contradicted": int(found.contradicted.sum())}
    counts |= {"duplicates": int((~found.keep).sum()), "contaminated": contaminated, "broken": dict(sorted(rejected.items()))}
    digest = hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
    return {"found": counts, "pairs": digest, "times": {"ingest": time.perf_counter() - began}, "phases": phases, "peaks": peaks}


def _prepare(data: str, candidates: bool) -> None:
    global _index
    _index = BenchmarkIndex(read_benchmarks(benchmarks_of(Path(data), candidates=candidates)), candidates=candidates)


def _stage(task: tuple[str, str]) -> tuple[int, Ids, Ids, int, Counter[str]]:
    """Read a file, spill its pairs chunk by chunk, and return the number of chunks, ids, rows and rejects."""
    file, spill = task
    assert _index is not None, "made when the process began"
    pair_ids, comparison_ids, rejected, rows, number = [], [], Counter[str](), 0, -1
    for number, read in enumerate(read_pair_file(file, SourceConfig(name=Path(file).name, path=file))):
        chunk = drop_contaminated(read, find_matches(read.pairs, _index))
        with pa.OSFile(f"{spill}-{number}.arrow", "wb") as sink, pa.ipc.new_file(sink, chunk.pairs.schema) as writer:
            writer.write_table(chunk.pairs)
        pair_ids.append(parse_ids(chunk.pairs["pair_id"]))
        comparison_ids.append(parse_ids(chunk.pairs["comparison_id"]))
        rejected.update(count_reasons(chunk.rejects))
        rows += chunk.num_rows_read
    return number + 1, np.concatenate(pair_ids), np.concatenate(comparison_ids), rows, rejected


def _write(task: tuple[str, str, int, Any, Any]) -> str:
    """Write the pairs of a file that are kept, and return their ids."""
    spill, out, num_chunks, keep, contradicted = task
    start, ids = 0, []
    for number in range(num_chunks):
        with pa.memory_map(f"{spill}-{number}.arrow") as source:
            pairs = pa.ipc.open_file(source).read_all()
            part = slice(start, start + pairs.num_rows)
            kept = pairs.select(POOL_SCHEMA.names).filter(pa.array(keep[part]))
            place = POOL_SCHEMA.get_field_index("contradicted")
            kept = kept.set_column(place, POOL_SCHEMA.field(place), pa.array(contradicted[part][keep[part]]))
            pq.write_table(kept, f"{out}-{number}.parquet", compression="zstd")
            ids.append("".join(kept["pair_id"].to_pylist()))
        start = part.stop
        os.unlink(f"{spill}-{number}.arrow")
    return "".join(ids)


def profile(data: Path, work: Path, cpus: int, *, candidates: bool) -> dict[str, float]:
    """Return the CPU microseconds that each thing done to a row takes, over the first file, in this process alone."""
    from synpref_ray.ingest.identity import name_pair
    from synpref_ray.ingest.partition import Comparison, IdWriter, Layout, PairFile
    from synpref_ray.ingest.plan import chunk_marks, make_plan, pairs_path, take_part
    from synpref_ray.ingest.source import Route
    from synpref_ray.ingest.structure import StructuredPair, structure_pair
    from synpref_ray.tables.pools import MAX_PAIRS_PER_SHARD, write_pool_shard
    from synpref_ray.tables.storage import Storage

    file = str(min((data / "pairs").iterdir()))
    source, storage = SourceConfig(name="wild", path=file), Storage(str(work))
    index = BenchmarkIndex(read_benchmarks(benchmarks_of(data, candidates=candidates)), candidates=candidates)
    lines = Path(file).read_bytes().splitlines()
    took: dict[str, float] = {}

    def timed(what: str, function: Any) -> Any:
        began = time.process_time()
        result = function()
        took[what] = took.get(what, 0.0) + (time.process_time() - began) / len(lines) * 1e6
        return result

    def parse() -> list[Any]:
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line.decode()))
            except ValueError:
                continue
        return rows

    rows = timed("parse JSON", parse)
    pairs = timed("structural filter", lambda: [structure_pair(row.get("prompt"), row.get("chosen"), row.get("rejected")) for row in rows])
    good = [pair for pair in pairs if isinstance(pair, StructuredPair)]
    timed("canonical JSON and hashes", lambda: [name_pair(pair.prompt, pair.chosen, pair.rejected) for pair in good])
    chunks = timed("columns, line reading, the rest", lambda: list(read_pair_file(file, source)))
    took["columns, line reading, the rest"] -= sum(took[what] for what in ("parse JSON", "structural filter", "canonical JSON and hashes"))
    ids = IdWriter(storage, "file")
    for number, chunk in enumerate(chunks):
        found = timed("13-word check", lambda chunk=chunk: find_matches(chunk.pairs, index))
        clean = timed("drop contaminated", lambda chunk=chunk, found=found: drop_contaminated(chunk, found))
        timed("write staged chunks", lambda number=number, clean=clean: write_staged(storage, pairs_path("file", number), clean.pairs))
        timed("write ids", lambda clean=clean: ids.add(clean.pairs))
    timed("write ids", ids.flush)
    files = [PairFile(Route.WILD, "wild", file, "file", tuple(map(tuple, ids.pieces)))]
    comparison = Comparison.of(storage, "compared", Layout.of(files))
    for number in range(comparison.num_parts):
        timed("compare ids", lambda number=number: comparison.decide_part(number))
    gathered = timed("gather decisions", lambda: [comparison.gather_piece(piece) for piece in range(len(comparison.layout.pieces))])
    plan = timed("cut shards", lambda: make_plan(comparison, gathered, max_pairs_per_shard=dict.fromkeys(Route, MAX_PAIRS_PER_SHARD)))
    for task in plan.tasks:
        for part in task.parts:
            staged = timed("read staged chunks", lambda part=part: read_staged(storage, part.chunk.path))
            table = timed("take kept pairs", lambda part=part, staged=staged: take_part(part, staged, chunk_marks(comparison, part.chunk)))
            timed("write shards", lambda part=part, table=table: write_pool_shard(storage, "wild", part.shard, table))
    return took


SIDES = {"ours": ours, "plain": plain, "profile": profile}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one side and print what it measured as one line of JSON."""
    made = argparse.ArgumentParser(description="one side of the ingest benchmark")
    made.add_argument("side", choices=list(SIDES))
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--cpus", type=int, required=True)
    made.add_argument("--candidates", action="store_true")
    arguments = made.parse_args(argv)
    result = SIDES[arguments.side](arguments.data, arguments.work, arguments.cpus, candidates=arguments.candidates)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
