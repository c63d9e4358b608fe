"""Poison pairs: narrowed down, rejected with a reason, everything else as without them; and no loop without an end."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from synpref_ray.errors import InputError, SynprefError
from synpref_ray.llm.engine import EngineDied
from synpref_ray.pipeline import crashes, steps
from synpref_ray.pipeline.crashes import CrashJournal, Lane, RangePlan, ShardGuard, plan_ranges
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, run_step
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_steps import LENGTHS, make_pool


class Killed(BaseException):
    """Stands for SIGKILL in the fast tier: nothing that a worker does can catch it."""


def test_ranges_are_halved_until_a_pair_is_left() -> None:
    assert plan_ranges(8, {}) == RangePlan(((0, 8),), ())
    assert plan_ranges(8, {(0, 8): 1}) == RangePlan(((0, 8),), ())
    assert plan_ranges(8, {(0, 8): 2}) == RangePlan(((0, 4), (4, 8)), ())
    assert plan_ranges(8, {(0, 8): 2, (4, 8): 1}) == RangePlan(((0, 4), (4, 6), (6, 8)), ())
    at_the_pair = {(0, 8): 2, (4, 8): 1, (4, 6): 1, (5, 6): 2}
    assert plan_ranges(8, at_the_pair) == RangePlan(((0, 4), (4, 5), (5, 6), (6, 8)), ())
    assert plan_ranges(8, {**at_the_pair, (5, 6): 3}) == RangePlan(((0, 4), (4, 5), (6, 8)), (5,))
    assert plan_ranges(1, {(0, 1): 3}) == RangePlan((), (0,))


def length_of(shard: pa.Table) -> pa.Table:
    lengths = [len(text) for text in shard["chosen"].to_pylist()]
    return pa.table([shard["pair_id"], pa.array(lengths, pa.int64()), pa.nulls(shard.num_rows, pa.string())], schema=LENGTHS)


class PoisonedWorker:
    """Counts characters, and dies of some pairs; `rows` lists how many pairs each call got."""

    def __init__(self, poison: set[str]):
        self.poison = poison
        self.rows: list[int] = []

    def __call__(self, shard: pa.Table) -> tuple[pa.Table, Mapping[str, float]]:
        self.rows.append(shard.num_rows)
        if self.poison & {*shard["pair_id"].to_pylist()}:
            raise Killed
        return length_of(shard), {"pairs": float(shard.num_rows)}


def run_until_done(storage: Storage, shard: pa.Table, worker: PoisonedWorker, run: str = "run") -> tuple[pa.Table, Mapping[str, float], int]:
    """Run a shard as Ray would, with a new worker process (guard and journal) after every death; return its table, counters and deaths."""
    for deaths in range(crashes.MAX_CRASHES + 2):
        try:
            guard = ShardGuard("count", [("", LENGTHS)])
            table, counters = guard(shard, 7, CrashJournal(storage, "table/crashes", run), worker)
        except Killed:
            continue
        return table, counters, deaths
    raise AssertionError("the loop has no end")


@pytest.mark.parametrize("poisoned", [[], [0], [12], [3, 4], [0, 6, 12]])
def test_poison_pairs_are_found_and_all_else_is_as_without_them(tmp_path: Path, poisoned: list[int]) -> None:
    storage, shard = Storage(str(tmp_path)), make_pairs(13)
    ids = shard["pair_id"].to_pylist()
    worker = PoisonedWorker({ids[row] for row in poisoned})
    table, counters, deaths = run_until_done(storage, shard, worker)
    wanted = length_of(shard).to_pylist()
    for row in poisoned:
        wanted[row] = {"pair_id": ids[row], "chosen_characters": None, "drop_reason": "engine_crash"}
    assert table.to_pylist() == wanted
    assert counters.get("crashed_pairs", 0) == len(poisoned)
    assert deaths == (0 if not poisoned else counters["worker_crashes"])
    assert deaths <= 2 + len(poisoned) * (4 + 3)
    if poisoned:
        assert storage.list_files("table") == []  # nothing is left behind


def test_a_part_that_came_through_is_not_run_again(tmp_path: Path) -> None:
    shard = make_pairs(8)
    worker = PoisonedWorker({shard["pair_id"][7].as_py()})
    run_until_done(Storage(str(tmp_path)), shard, worker)
    assert Counter(worker.rows) == {8: 2, 4: 2, 2: 2, 1: 1 + 3}  # each half that came through once, each that did not once; the last pair three times


def test_one_death_is_chance_and_deaths_of_earlier_runs_count_for_nothing(tmp_path: Path) -> None:
    storage, shard = Storage(str(tmp_path)), make_pairs(4)
    for number in range(5):  # five drivers, each killed with its worker
        with pytest.raises(Killed):
            ShardGuard("count", [("", LENGTHS)])(shard, 7, CrashJournal(storage, "t", f"run{number}"), PoisonedWorker({shard["pair_id"][0].as_py()}))
    worker = PoisonedWorker(set())
    table, counters, _ = run_until_done(storage, shard, worker, "run9")
    assert (table, worker.rows) == (length_of(shard), [4])
    assert "worker_crashes" not in counters


def test_an_error_that_can_be_told_is_no_crash_but_a_dead_engine_is(tmp_path: Path) -> None:
    journal, shard = CrashJournal(Storage(str(tmp_path)), "t", "run"), make_pairs(2)

    def fails(error: Exception) -> None:
        def run(rows: pa.Table) -> tuple[pa.Table, Mapping[str, float]]:
            raise error

        with pytest.raises(type(error)):
            ShardGuard("count", [("", LENGTHS)])(shard, 7, journal, run)

    fails(ValueError("told"))
    assert not CrashJournal(journal.storage, "t", "run").crashes(7)
    fails(EngineDied("gone"))
    assert CrashJournal(journal.storage, "t", "run").crashes(7) == {(0, 2): 1}


def test_a_broken_engine_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "MAX_CRASHES", 12)
    shard = make_pairs(64)
    with pytest.raises(SynprefError, match="shard 7 has killed 13 workers"):
        run_until_done(Storage(str(tmp_path)), shard, PoisonedWorker({*shard["pair_id"].to_pylist()}))


def test_a_table_without_a_place_for_the_reason_says_so(tmp_path: Path) -> None:
    shard, bare = make_pairs(1), pa.schema([LENGTHS.field("pair_id"), LENGTHS.field("chosen_characters")])
    worker = PoisonedWorker({*shard["pair_id"].to_pylist()})
    for _ in range(crashes.MAX_PAIR_CRASHES):
        with pytest.raises(Killed):
            ShardGuard("count", [("", bare)])(shard, 7, CrashJournal(Storage(str(tmp_path)), "t", "run"), worker)
    with pytest.raises(SynprefError, match="no place for a reason"):
        ShardGuard("count", [("", bare)])(shard, 7, CrashJournal(Storage(str(tmp_path)), "t", "run"), worker)


def die_while_starting(storage: Storage) -> None:
    process = os.fork()
    if not process:
        with CrashJournal(storage, "t", "run").starting("actor"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_a_worker_that_dies_while_it_starts_is_given_up(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for _ in range(crashes.MAX_START_CRASHES):
        die_while_starting(storage)
    with pytest.raises(SynprefError, match="died 3 times in a row while it started"), CrashJournal(storage, "t", "run").starting("actor"):
        pass
    with CrashJournal(storage, "t", "run").starting("another"), CrashJournal(storage, "t", "run2").starting("actor"):
        pass


def test_deaths_at_start_count_in_a_row(tmp_path: Path) -> None:
    storage, journal = Storage(str(tmp_path)), CrashJournal(Storage(str(tmp_path)), "t", "run")
    for _ in range(2):
        for _ in range(crashes.MAX_START_CRASHES - 1):
            die_while_starting(storage)
        with pytest.raises(InputError), journal.starting("actor"):
            raise InputError("no such model")  # told, so no death; nor has it started
        assert len(storage.list_files("t/starts")) == crashes.MAX_START_CRASHES - 1
        with journal.starting("actor"):
            pass
    assert storage.list_files("t/starts") == []


def test_a_suspect_runs_alone() -> None:
    lane, order = Lane(), []
    inside = threading.Event()

    def run(name: str, alone: bool) -> None:
        with lane.enter(alone=alone):
            order.append(name)
            if name == "first":
                inside.set()
                while lane._waiting_alone == 0:
                    time.sleep(0.001)
            order.append(name)

    threads = [threading.Thread(target=run, args=("first", False))]
    threads[0].start()
    inside.wait()
    threads += [threading.Thread(target=run, args=(name, alone)) for name, alone in (("suspect", True), ("later", False))]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[:2] == ["first", "first"]
    assert order[2:] in (["suspect", "suspect", "later", "later"], ["later", "later", "suspect", "suspect"])


class DyingCounter:
    """Kills its own process when it meets a poison pair; hangs over another."""

    def __init__(self, log: str, poison: frozenset[str], hangs: frozenset[str] = frozenset()):
        self._log = log
        self._poison = poison
        self._hangs = hangs

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        with open(self._log, "a") as log:
            log.write(f"{key.number}:{shard.num_rows}\n")
        ids = {*shard["pair_id"].to_pylist()}
        if self._poison & ids:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._hangs & ids:
            threading.Event().wait()
        return length_of(shard), {"pairs": float(shard.num_rows)}


def dying_step(log: Path, resources: Resources, poison: set[str], hangs: set[str]) -> Step:
    return Step(
        name="count",
        version=1,
        worker=DyingCounter,
        outputs=(Output("lengths", LENGTHS),),
        settings={},
        worker_arguments=lambda _: {"log": str(log), "poison": frozenset(poison), "hangs": frozenset(hangs)},
        resources=resources,
    )


def ids_of(pool: Pool, shard: int, row: int) -> str:
    return str(pool.read(shard)["pair_id"][row].as_py())


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_actors_that_die_are_replaced_and_poison_is_rejected(tmp_path: Path) -> None:
    check_step(tmp_path, Resources(num_workers=2, min_workers=1, num_cpus=0.5, concurrent_shards=2), poison=(1, 0), hangs=None)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_worker_that_hangs_is_replaced_too(tmp_path: Path) -> None:
    check_step(tmp_path, Resources(num_workers=1, max_shard_seconds=5.0), poison=None, hangs=(1, 1))


def check_step(folder: Path, resources: Resources, poison: tuple[int, int] | None, hangs: tuple[int, int] | None) -> None:
    """Run a step on Ray whose workers die of one pair or hang over it; all but that pair is byte for byte as without it."""
    sizes = [3, 2, 3]
    pool, clean = make_pool(folder / "a", "seed", sizes), make_pool(folder / "b", "seed", sizes)
    bad = {place: ids_of(pool, *place) for place in (poison, hangs) if place is not None}
    step = dying_step(folder / "log", resources, {bad[poison]} if poison else set(), {bad[hangs]} if hangs else set())
    result = run_step(step, [StepInput(pool, ("chosen",))])
    wanted = run_step(dying_step(folder / "log2", Resources(), set(), set()), [StepInput(clean, ("chosen",))]).sidecars[0][0]
    assert result.rejected == {"engine_crash": 1}
    assert result.counters["crashed_pairs"] == 1
    sidecar = result.sidecars[0][0]
    [(shard, row)] = bad
    for number in range(len(sizes)):
        path = f"shard-{number:05d}.parquet"
        if number != shard:
            assert pool.storage.read_bytes(f"{sidecar.folder}/{path}") == clean.storage.read_bytes(f"{wanted.folder}/{path}")
    rows = wanted.read(shard).to_pylist()
    rows[row] = {"pair_id": rows[row]["pair_id"], "chosen_characters": None, "drop_reason": "engine_crash"}
    assert sidecar.read(shard).to_pylist() == rows
    rejects = [pool.storage.read_table(path) for path in pool.storage.list_files("rejects/count")]
    assert [table["pair_id"].to_pylist() for table in rejects] == [[bad[shard, row]]]
    assert [path for path in pool.storage.list_files(sidecar.folder) if "crashes" in path] == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_rules_are_one_task_a_shard_and_nothing_is_retried_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data import Dataset

    plans: list[str] = []
    bounds: list[object] = []
    write, batches = Dataset.write_datasink, Dataset.map_batches_internal

    def bounds_in(arguments: Mapping[str, object]) -> dict[str, object]:
        return {name: arguments[name] for name in ("max_retries", "max_restarts", "max_task_retries") if name in arguments}

    def write_and_look(dataset: Dataset, *arguments: object, **named: Any) -> None:
        write(dataset, *arguments, **named)
        plans.extend(line.split(": ")[0] for line in dataset._write_ds.stats().splitlines() if line.startswith("Operator"))
        bounds.append(bounds_in(named["ray_remote_args"]))

    def map_and_look(dataset: Dataset, *arguments: object, **named: object) -> Dataset:
        bounds.append(bounds_in(named))
        return batches(dataset, *arguments, **named)

    monkeypatch.setattr(Dataset, "write_datasink", write_and_look)
    monkeypatch.setattr(Dataset, "map_batches_internal", map_and_look)
    monkeypatch.setattr(steps, "INLINE_ROWS", 0)
    pool = make_pool(tmp_path, "seed", [2, 2])
    run_step(dying_step(tmp_path / "log", Resources(), set(), set()), [StepInput(pool, ("chosen",))])
    assert len(plans) == 1, plans  # reading, the rule and writing fused
    run_step(replace(dying_step(tmp_path / "log", Resources(num_workers=1), set(), set()), version=2), [StepInput(pool, ("chosen",))])
    tasks, actors = {"max_retries": crashes.MAX_TASK_RETRIES}, {"max_restarts": crashes.MAX_RESTARTS, "max_task_retries": crashes.MAX_RESTARTS}
    assert bounds == [tasks, tasks, actors, tasks]


class DiesAtBirth(DyingCounter):
    def __init__(self, log: str) -> None:
        with open(log, "a") as file:
            file.write("born\n")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_worker_that_never_starts_ends_the_job_with_the_reason(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3, 4])
    step = Step("born", 1, DiesAtBirth, (Output("lengths", LENGTHS),), {}, worker_arguments=lambda _: {"log": str(tmp_path / "log")})
    with pytest.raises(SynprefError, match="died 3 times in a row while it started"):
        run_step(replace(step, resources=Resources(num_workers=1)), [StepInput(pool, ("chosen",))])
    assert (tmp_path / "log").read_text().split() == ["born"] * 3
