"""What a step has used outlives its runs: one that is stopped and started again loses none, and no shard's bytes change for it."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.errors import InputError, SynprefError
from synpref_ray.pipeline.steps import Output, Resources, ShardKey, Step, StepInput, plan_sidecars, run_step
from synpref_ray.pipeline.usage import UsageRecord
from synpref_ray.reporting.status import read_status
from synpref_ray.reporting.usage import read_usage
from synpref_ray.schema import DropReason
from synpref_ray.tables.pools import shard_path
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.pipeline.test_steps import LENGTHS, make_pool


class PaidWorker:
    """Pays 0.5 for a shard, and fails at a call of that number."""

    def __init__(self, fails_at: int):
        self._calls = 0
        self._fails_at = fails_at

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        self._calls += 1
        if self._calls == self._fails_at:
            raise InputError("the endpoint is away")
        columns = [shard["pair_id"], pa.array(range(shard.num_rows), pa.int64()), pa.nulls(shard.num_rows, pa.string())]
        return pa.table(columns, schema=LENGTHS), {"judged": 2.0, "shard_cost": 0.5, "shard_output_tokens": 7.0}


def paid_step(fails_at: int) -> Step:
    return Step(
        name="judge",
        version=1,
        worker=PaidWorker,
        outputs=(Output("votes", LENGTHS),),
        settings={},
        worker_arguments=lambda _: {"fails_at": fails_at},
        resources=Resources(1, num_cpus=0.5),
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_a_stopped_run_s_usage_counts_and_shards_are_the_same(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "stopped", "seed", [2, 2, 2])
    with pytest.raises(InputError, match="the endpoint is away"):
        run_step(paid_step(fails_at=2), [StepInput(pool, ("chosen",))])
    assert read_status(pool.storage, max_runs=1).cost == 0.5  # the table is not sealed
    result = run_step(paid_step(fails_at=0), [StepInput(pool, ("chosen",))])
    sidecar = result.sidecars[0][0]
    assert sidecar.manifest["usage"] == {"cost": 1.5, "gpu_seconds": 0.0, "output_tokens": 21.0, "prompt_tokens": 0.0}
    assert result.counters == {"judged": 2.0 * result.shards_computed}
    assert read_status(pool.storage, max_runs=1).cost == 1.5
    assert not pool.storage.list_entries(f"{sidecar.folder}/usage")
    whole = make_pool(tmp_path / "whole", "seed", [2, 2, 2])
    other = run_step(paid_step(fails_at=0), [StepInput(whole, ("chosen",))]).sidecars[0][0]
    assert other.folder == sidecar.folder
    for number in range(3):
        path = shard_path(sidecar.folder, number)
        assert pool.storage.read_bytes(path) == whole.storage.read_bytes(path)


class HalfRefused:
    """Makes two outputs, and rejects every row of the second."""

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        lengths = pa.array([1] * shard.num_rows, pa.int64())
        reasons = pa.array([DropReason.TOO_LONG.value] * shard.num_rows)
        columns = {"chosen_characters": lengths, "drop_reason": pa.nulls(shard.num_rows, pa.string()), "b.chosen_characters": lengths}
        return pa.table({"pair_id": shard["pair_id"], **columns, "b.drop_reason": reasons}), {}


def test_the_record_goes_when_all_outputs_are_sealed_and_not_before(tmp_path: Path) -> None:
    sources = [StepInput(make_pool(tmp_path, "seed", [2]), ("chosen",))]
    step = Step(name="halves", version=1, worker=HalfRefused, outputs=(Output("a", LENGTHS), Output("b", LENGTHS, "b.")), settings={})
    first, second = plan_sidecars(step, sources)[0]
    with UsageRecord([first], 0.0, "worker").working(0, 0) as used:
        used["shard_cost"] = 0.5
    with pytest.raises(SynprefError, match="rejected 2 of 2 rows"):
        run_step(step, sources)
    assert (first.is_sealed, second.is_sealed) == (True, False)
    run_step(replace(step, max_failed_fraction=1.0), sources)
    assert second.is_sealed
    assert first.manifest["usage"]["cost"] == 0.5
    assert not first.pool.storage.list_entries(f"{first.folder}/usage")


def test_storage_that_hangs_holds_up_no_other_shard_s_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Sidecar(make_pool(tmp_path, "seed", [2, 2]), "votes", "a" * 32)
    record = UsageRecord([table], 1.0, "worker", clock=lambda: 0.0)
    hangs, goes_on, at_work, write = threading.Event(), threading.Event(), threading.Event(), Storage.write_bytes

    def write_in_the_end(storage: Storage, path: str, data: bytes) -> None:
        hangs.set()
        goes_on.wait(20)
        write(storage, path, data)

    def work(shard: int) -> None:
        with record.working(0, shard) as used:
            used.update({"shard_cost": 0.5, "judged": 2.0})
            if shard == 1:
                at_work.set()

    monkeypatch.setattr(Storage, "write_bytes", write_in_the_end)
    first, second = (threading.Thread(target=work, args=(shard,)) for shard in range(2))
    first.start()
    assert hangs.wait(10)
    second.start()
    assert at_work.wait(5), "a shard's work begins while another's record is being written"
    goes_on.set()
    first.join()
    second.join()
    assert read_usage(table.pool.storage, table.folder)["cost"] == 1.0
