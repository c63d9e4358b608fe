"""`run_step`: the same tables inline and on Ray, pending shards only, whole shards, rejects, leases."""

import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from ray import cloudpickle
from ray.data import ActorPoolStrategy
from ray.data._internal.logical.optimizers import get_execution_plan

from synpref_ray.errors import InputError, RunConflictError, SchemaError, SynprefError
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.pipeline import steps
from synpref_ray.pipeline.cluster import configure_ray_data, data_context
from synpref_ray.pipeline.llm_steps import LLMStepConfig, prepare_workers, with_time_for_shards
from synpref_ray.pipeline.shard_io import COUNTERS, ShardSource, ShardWriter, read_shard
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, num_workers, plan_dataset, plan_sidecars, run_step
from synpref_ray.schema import POOL_SCHEMA, DropReason
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.pools import Pool, Shard, commit_pool, shard_path, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar, open_sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.small_loop import REPOSITORY, environment

LENGTHS = pa.schema([pa.field("pair_id", pa.string(), nullable=False), ("chosen_characters", pa.int64()), ("drop_reason", pa.string())])


class CharacterCounter:
    """Counts characters; logs every shard that it computes, so that a test can count calls across processes."""

    def __init__(self, log: str, delay_seconds: float = 0.0, fail_above: int = 10**9):
        self._log = log
        self._delay = delay_seconds
        self._fail_above = fail_above

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        time.sleep(self._delay * (key.number % 3))
        with open(self._log, "a") as log:
            log.write(f"{key.table}:{key.number}\n")
        lengths = [len(text) for text in shard["chosen"].to_pylist()]
        long = [length > self._fail_above for length in lengths]
        columns = [
            shard["pair_id"],
            pa.array([None if bad else length for length, bad in zip(lengths, long, strict=True)], pa.int64()),
            pa.array([DropReason.TOO_LONG.value if bad else None for bad in long], pa.string()),
        ]
        return pa.table(columns, schema=LENGTHS), {"pairs": shard.num_rows}


class Shuffler:
    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        table = shard.select(["pair_id"]).append_column("chosen_characters", pa.array([0] * shard.num_rows))
        return table.append_column("drop_reason", pa.nulls(shard.num_rows, pa.string())).take(list(range(shard.num_rows))[::-1]), {}


class NeverStarts(Shuffler):
    def __init__(self) -> None:
        raise InputError("the model has no reward head")


def make_pool(root: Path, name: str, sizes: list[int]) -> Pool:
    storage = Storage(str(root))
    pairs = make_pairs(sum(sizes), topic=name)
    shards, start = [], 0
    for number, size in enumerate(sizes):
        shards.append(write_pool_shard(storage, name, number, pairs.slice(start, size)))
        start += size
    return commit_pool(storage, name, "f" * 32, shards, {})


def counting_step(log: Path, resources: Resources, **arguments: float) -> Step:
    return Step(
        name="count",
        version=1,
        worker=CharacterCounter,
        outputs=(Output("lengths", LENGTHS),),
        settings={},
        worker_arguments=lambda _: {"log": str(log), **arguments},
        resources=resources,
    )


def read_log(log: Path) -> list[str]:
    return sorted(log.read_text().split()) if log.exists() else []


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3, 0, 2])
    step = counting_step(tmp_path / "log", Resources())
    first = run_step(step, [StepInput(pool, ("chosen",))])
    second = run_step(step, [StepInput(pool, ("chosen",))])
    assert (first.shards_computed, first.rows_computed, first.counters) == (2, 5, {"pairs": 5})
    assert (second.shards_computed, second.rows_computed) == (0, 0)
    assert read_log(tmp_path / "log") == ["0:0", "0:2"]
    sidecar = open_sidecar(pool, "lengths")
    assert sidecar.read_all(["pair_id"])["pair_id"].to_pylist() == pool.read_all(["pair_id"])["pair_id"].to_pylist()
    assert sidecar.read(1).num_rows == 0


def test_only_missing_shards_are_computed_after_a_kill(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [2, 2, 2])
    step = counting_step(tmp_path / "log", Resources())
    sidecar = run_step(step, [StepInput(pool, ("chosen",))]).sidecars[0][0]
    before = pool.storage.read_bytes(shard_path(sidecar.folder, 1))
    pool.storage.delete(f"{sidecar.folder}/manifest.json")
    pool.storage.delete(shard_path(sidecar.folder, 1))
    (tmp_path / "log").unlink()
    run_step(step, [StepInput(pool, ("chosen",))])
    assert read_log(tmp_path / "log") == ["0:1"]
    assert pool.storage.read_bytes(shard_path(sidecar.folder, 1)) == before


def test_rejects_of_an_earlier_run_are_counted_too(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3, 0, 3])
    lengths = sorted(len(text) for text in pool.read_all(["chosen"])["chosen"].to_pylist())
    step = counting_step(tmp_path / "log", Resources(), fail_above=lengths[3])
    sidecar = run_step(step, [StepInput(pool, ("chosen",))]).sidecars[0][0]
    assert sidecar.manifest["rejected"] == {"too_long": 2}
    for number in (0, 2):
        pool.storage.delete(f"{sidecar.folder}/manifest.json")
        pool.storage.delete(shard_path(sidecar.folder, number))
        assert run_step(step, [StepInput(pool, ("chosen",))]).rejected == {"too_long": 2}


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """Ray does a task again whose process died between its write and its return."""
    pool = make_pool(tmp_path, "seed", [3])
    step = counting_step(tmp_path / "log", Resources(), fail_above=1)
    [[sidecar]] = plan_sidecars(step, [StepInput(pool, ("chosen",))])
    writer = ShardWriter(step.name, step.outputs, [[sidecar]])
    shard = read_shard(StepInput(pool, ("chosen",)), ShardKey(0, 0), 3)

    def block(drop_reason: str | None) -> pa.Table:
        table = shard.append_column("chosen_characters", pa.array([1, 2, 3])).append_column(COUNTERS, pa.array(["{}"] * 3))
        return table.append_column("drop_reason", pa.array([drop_reason, None, None], pa.string()))

    first = writer.write(block("too_long"))
    state = (tmp_path / shard_path(sidecar.folder, 0)).stat()
    again = writer.write(block(None))
    kept = (tmp_path / shard_path(sidecar.folder, 0)).stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (state.st_ino, state.st_mtime_ns)
    assert again == first
    assert first["reasons"] == [{"too_long": 1}]


def test_rejects_are_written_whole_and_counted(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [4])
    longest = max(len(text) for text in pool.read(0)["chosen"].to_pylist())
    step = counting_step(tmp_path / "log", Resources(), fail_above=longest - 1)
    result = run_step(step, [StepInput(pool, ("chosen",))])
    assert result.rejected == {"too_long": 1}
    files = pool.storage.list_files("rejects/count")
    assert len(files) == 1
    reject = pool.storage.read_table(files[0]).to_pylist()[0]
    assert len(reject["chosen"]) == longest
    assert reject["drop_reason"] == "too_long"
    with pytest.raises(SynprefError, match="rejected 1 of 4 rows"):
        run_step(replace(step, version=2, max_failed_fraction=0.1), [StepInput(pool, ("chosen",))])


def test_a_failed_step_names_the_shards_to_delete_once_the_cause_is_mended(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [2, 2])
    inputs = [StepInput(pool, ("chosen",))]
    broken, mended = (counting_step(tmp_path / "log", Resources(), fail_above=most) for most in (0, 10**9))  # one fingerprint
    for step in (broken, mended):  # what was made stays
        with pytest.raises(SynprefError, match="rejected 4 of 4 rows") as raised:
            run_step(step, inputs)
    found = re.search(r"delete the (\S+) files in (\S+) \(and the journal", str(raised.value))
    assert found is not None
    deleted = [path.unlink() for path in Path(found[2]).glob(found[1])]
    assert len(deleted) == 2
    assert run_step(mended, inputs).rejected == {}


def test_a_small_pool_with_many_rejects_is_taken_beside_a_large_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = make_pool(tmp_path, "large", [4, 4, 4]), make_pool(tmp_path, "small", [3])
    step = counting_step(tmp_path / "log", Resources(), fail_above=0)  # every row of a table that it makes is rejected
    run_step(counting_step(tmp_path / "log", Resources()), [StepInput(large, ("chosen",))])
    both = [StepInput(large, ("chosen",)), StepInput(small, ("chosen",))]
    with pytest.raises(SynprefError, match=r"rejected 3 of 3 rows of pool 'small'.*more than 50%.*raise the step's max_failed_fraction"):
        run_step(step, both[1:])  # alone it is all that the step has to show
    monkeypatch.setattr(steps, "TELLING_REJECTS", 3)
    with pytest.raises(SynprefError, match="rejected 3 of 3 rows of pool 'small'"):
        run_step(step, both)  # as many rejects as tell something
    monkeypatch.setattr(steps, "TELLING_REJECTS", 4)
    with pytest.raises(SynprefError, match="rejected 3 of 3 rows of pool 'small'"):
        run_step(replace(step, max_failed_fraction=0.1), both)  # 3 of 15 are too many by that measure
    assert run_step(step, both).rejected == {"too_long": 3}
    assert read_log(tmp_path / "log") == ["0:0", "0:0", "0:1", "0:2"]  # a refused table's shards stay


def test_a_worker_that_reorders_rows_is_an_error(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [4])
    step = Step("shuffle", 1, Shuffler, (Output("lengths", LENGTHS),), {})
    with pytest.raises(SchemaError, match="changed the rows or the order"):
        run_step(step, [StepInput(pool, ("chosen",))])


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [4])
    step = counting_step(tmp_path / "log", Resources())
    folder = run_step(step, [StepInput(pool, ("chosen",))]).sidecars[0][0].folder
    pool.storage.delete(f"{folder}/manifest.json")
    with Lease(pool.storage, f"{folder}/lease.json"), pytest.raises(RunConflictError, match="is held by process"):
        run_step(step, [StepInput(pool, ("chosen",))])


class LosesItsLease:
    """Writes another driver's name into the lease, as a takeover would."""

    def __init__(self, storage: Storage, lease: str):
        self._storage = storage
        self._lease = lease

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        self._storage.write_json(self._lease, {"owner": "another", "host": "elsewhere", "pid": 1, "renewed": time.time()})
        return shard.select(["pair_id"]), {}


def test_a_table_whose_lease_was_lost_is_not_sealed(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [4])
    output = Output("ids", pa.schema([LENGTHS.field("pair_id")]))
    step = Step("lose", 1, LosesItsLease, (output,), {})
    sidecar = plan_sidecars(step, [StepInput(pool, ("chosen",))])[0][0]
    step = replace(step, worker_arguments=lambda _: {"storage": pool.storage, "lease": f"{sidecar.folder}/lease.json"})
    with pytest.raises(RunConflictError, match="taken over"):
        run_step(step, [StepInput(pool, ("chosen",))])
    assert not sidecar.is_sealed


def test_what_travels_to_a_read_task_does_not_grow_with_the_pool(tmp_path: Path) -> None:
    sizes = []
    for num_shards in (1, 1000):
        pool = Pool(Storage(str(tmp_path)), "seed", 0, "f" * 32, tuple(Shard(number, 3, 100, f"{number:032x}") for number in range(num_shards)))
        beside = tuple((Sidecar(pool, name, "0" * 32), {"drop_reason": f"{name}.drop_reason"}) for name in ("attributes", "embeddings"))
        tasks = ShardSource([StepInput(pool, ("prompt",), beside)], [(ShardKey(0, 0), 3)]).get_read_tasks(1)
        sizes.append(len(cloudpickle.dumps(tasks)))
    assert sizes[0] == sizes[1]


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_many_shards_on_actors_equal_the_inline_run(tmp_path: Path) -> None:
    sizes = [3, 1, 0, 5, 2, 4, 7, 1, 6, 2]
    pool, other = make_pool(tmp_path / "a", "seed", sizes), make_pool(tmp_path / "a", "wild", [2, 2])
    actors = counting_step(tmp_path / "log", Resources(num_workers=2, num_cpus=0.5, concurrent_shards=2), delay_seconds=0.05)
    result = run_step(actors, [StepInput(pool, ("chosen",)), StepInput(other, ("chosen",))])
    assert result.rows_computed == sum(sizes) + 4
    assert len(read_log(tmp_path / "log")) == 11
    inline_pool = make_pool(tmp_path / "b", "seed", sizes)
    inline = [run_step(counting_step(tmp_path / "log2", Resources()), [StepInput(inline_pool, ("chosen",))]).sidecars[0][0]]
    for number in range(len(sizes)):
        assert result.sidecars[0][0].read(number).equals(inline[0].read(number))


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_an_error_of_ours_in_a_worker_reaches_the_driver_as_itself(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [4, 4])
    step = Step("shuffle", 1, Shuffler, (Output("lengths", LENGTHS),), {}, resources=Resources(num_workers=1))
    with pytest.raises(SchemaError, match="changed the rows or the order"):
        run_step(step, [StepInput(pool, ("chosen",))])


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_an_error_of_ours_in_the_constructor_of_a_worker_reaches_the_driver_as_itself(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [4, 4])
    step = Step("start", 1, NeverStarts, (Output("lengths", LENGTHS),), {}, resources=Resources(num_workers=1))
    with pytest.raises(InputError, match=r"^the model has no reward head$") as caught:
        run_step(step, [StepInput(pool, ("chosen",))])
    assert type(caught.value) is InputError


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("resources", "operators"),
    [
        (Resources(), ["ReadShards->MapBatches"]),
        (Resources(num_cpus=0.5, environment=(("A", "1"),)), ["ReadShards->MapBatches"]),
        (Resources(2), ["ReadShards", "MapBatches"]),
        (Resources(2, num_gpus=1), ["ReadShards", "MapBatches"]),
    ],
    ids=str,
)
def test_stateless_work_is_done_where_its_shard_is_read(tmp_path: Path, resources: Resources, operators: list[str]) -> None:
    pool = make_pool(tmp_path, "seed", [3, 3])
    step, inputs, pending = counting_step(tmp_path / "log", resources), [StepInput(pool, ("chosen",))], [ShardKey(0, 0), ShardKey(0, 1)]
    dataset, _ = plan_dataset(step, plan_sidecars(step, inputs), ShardSource(inputs, [(key, 3) for key in pending]), pending)
    plan, _ = get_execution_plan(dataset._logical_plan)
    found, operator = [], plan.dag
    while operator.input_dependencies:  # the last one holds the read tasks
        found.insert(0, re.sub(r"\(.*?\)", "", operator.name))
        operator = operator.input_dependencies[0]
    assert found == operators


@pytest.mark.parametrize(
    ("resources", "bound", "workers"),
    [
        (Resources(), (4, 0), None),
        (Resources(9), (4, 0), 3),
        (Resources(9, 2.0), (4, 0), 1),
        (Resources(2), (4, 0), 2),
        (Resources(9, num_gpus=1.0), (math.inf, math.inf), 9),
    ],
)
@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_steps_without_gpus_ask_for_no_more_cpus_than_allowed(
    tmp_path: Path, resources: Resources, bound: tuple[float, float], workers: int | None
) -> None:
    pool = make_pool(tmp_path, "seed", [1] * 12)
    step, inputs, pending = counting_step(tmp_path / "log", resources), [StepInput(pool, ("chosen",))], [ShardKey(0, number) for number in range(12)]
    configure_ray_data(max_cpus=4)
    try:
        with data_context(resources.num_gpus):
            dataset, _ = plan_dataset(step, plan_sidecars(step, inputs), ShardSource(inputs, [(key, 1) for key in pending]), pending)
    finally:
        configure_ray_data()
    limits = dataset.context.execution_options.resource_limits
    assert (limits.cpu, limits.gpu) == bound
    compute = dataset._logical_plan.dag.compute
    assert (compute.max_size if isinstance(compute, ActorPoolStrategy) else None) == workers


def test_endpoint_workers_share_its_limits_by_how_many_may_work() -> None:
    engine = EndpointConfig(base_url="http://localhost:1", model="m", requests_per_minute=60, tokens_per_minute=900, max_concurrent_requests=6)
    config = LLMStepConfig(engine=engine, num_workers=9)
    step = replace(counting_step(Path("log"), config.resources), worker_arguments=lambda tables: {"config": config, "tables": tables})
    configure_ray_data(max_cpus=4)
    try:
        prepared = prepare_workers(step)
        assert num_workers(prepared) == 3
    finally:
        configure_ray_data()
    with prepared.worker_arguments([])["config"].open_engine(None) as opened:  # as in a worker, where no bound is known
        assert (opened._config.requests_per_minute, opened._config.tokens_per_minute, opened._config.max_concurrent_requests) == (20, 300, 2)


@pytest.mark.parametrize(("rows", "seconds"), [([], 60.0), ([1, 512], 60.0), ([513, 3], 60.0 * 513 / 512), ([100, 8192], 960.0)])
def test_a_worker_of_engines_has_time_in_proportion_for_shards_of_more_than_512_pairs(tmp_path: Path, rows: list[int], seconds: float) -> None:
    shards = tuple(Shard(number, count, 1, "") for number, count in enumerate(rows))
    pool = Pool(Storage(str(tmp_path)), "wild", 0, "", shards)
    step = with_time_for_shards(counting_step(tmp_path / "log", Resources(1, max_shard_seconds=60.0)), [StepInput(pool, ("chosen",))])
    assert step.resources.max_shard_seconds == pytest.approx(seconds)
    never = with_time_for_shards(counting_step(tmp_path / "log", Resources(1)), [StepInput(pool, ("chosen",))])
    assert never.resources.max_shard_seconds == 0


def test_pool_schema_is_what_the_builder_makes() -> None:
    assert make_pairs(2).schema.equals(POOL_SCHEMA)


@pytest.mark.ray
def test_workers_that_ask_for_gpus_get_whole_shards(tmp_path: Path) -> None:
    code = (
        "import ray, sys; from pathlib import Path; from synpref_ray.pipeline.cluster import configure_ray_data; "
        "from synpref_ray.pipeline.steps import Resources, StepInput, run_step; from tests.pipeline.test_steps import counting_step, make_pool; "
        "ray.init(address='local', num_cpus=4, num_gpus=1, object_store_memory=100_000_000, include_dashboard=False); configure_ray_data(); "
        "root = Path(sys.argv[1]); pool = make_pool(root, 'seed', [3, 1, 2]); "
        "step = counting_step(root / 'log', Resources(num_workers=1, num_gpus=1.0)); "
        "assert run_step(step, [StepInput(pool, ('chosen',))]).rows_computed == 6"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_log(tmp_path / "log") == ["0:0", "0:1", "0:2"]
