"""How long the whole loop takes: the demo's steps, by the paces of finished runs.

Our choice throughout: a run's events hold every step with its pairs and seconds, so any finished run on a machine tells about the next one there.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from synpref_ray.config import load_config
from synpref_ray.errors import InputError
from synpref_ray.pipeline.demo import DemoConfig
from synpref_ray.pipeline.measured_runs import read_runs
from synpref_ray.planning.loop import LoopShares, LoopSizes, loop_steps, read_shares
from synpref_ray.planning.timing import MeasuredRuns, TimeEstimate, estimate, fit_paces, leave_one_out
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.storage import Storage


def describe_time(storages: Sequence[Storage], demo_config: str, demo_data: str, expected_seconds: float, run: Run) -> str:
    """Estimate a demo from finished runs; return the tables.

    Raises:
        InputError: the runs hold no finished Stage 2, or lack a kind of step.
    """
    read = [read_runs(storage) for storage in storages]
    runs = MeasuredRuns(tuple(step for one, _ in read for step in one.steps), sum(one.run_seconds for one, _ in read))
    with_shares = next(((storage, metrics) for storage, (_, metrics) in zip(storages, read, strict=True) if "stage2" in metrics), None)
    if with_shares is None:
        raise InputError("none of the measured workspaces has a finished Stage 2: its shares decide how much work there is")
    shares = _shares(*with_shares)
    demo = load_config(DemoConfig, demo_config, [f"data={json.dumps(demo_data)}"] if demo_data else [])
    planned = loop_steps(demo_sizes(demo), shares)
    found = estimate(planned, runs)
    run.metrics["time"] = {
        "seconds": found.seconds,
        "overhead": found.overhead,
        "steps": [{"step": s.name, "work": s.work, "seconds": t} for s, t in found.steps],
    }
    return "\n".join([_time_table(found, runs), *_checks(expected_seconds, found, runs, run)])


def _shares(storage: Storage, metrics: Mapping[str, Any]) -> LoopShares:
    pools = {name: _pool_rows(storage, name) for name in ("seed", "unverified")}
    return read_shares(metrics, seed=pools["seed"], unverified=pools["unverified"])


def _pool_rows(storage: Storage, name: str) -> int:
    return open_pool(storage, name).num_rows


def demo_sizes(demo: DemoConfig) -> LoopSizes:
    """Return what is known of a demo before it runs: its data files, counted, and its configs."""
    stage1, training = demo.stage1(), demo.training()
    rows = {source.name.removeprefix("demo-"): _lines(source.path) for source in demo.ingest().sources}
    return LoopSizes(
        seed=rows["seed"],
        unverified=rows["unverified"],
        wild=rows["wild"],
        held_out=pq.read_metadata(demo.held_out).num_rows,
        seed_gold=min(demo.seed_gold_pairs, rows["seed"]),
        round_gold=demo.round_gold_pairs,
        rounds=stage1.stop.max_rounds,
        taggers=tuple(tagger.tagger.name for tagger in stage1.taggers),
        judges=tuple(judge.judge.judge for judge in stage1.judges),
        gold_epochs=stage1.gold_train.num_epochs,
        silver_epochs=stage1.train.num_epochs,
        final_epochs=training.train.num_epochs,
        final_seeds=len(demo.comparison_seeds),
    )


def _lines(file: str) -> int:
    with open(file, "rb") as stream:
        return sum(1 for line in stream if line.strip())


def _time_table(found: TimeEstimate, runs: MeasuredRuns) -> str:
    paces = fit_paces(runs.steps)
    kinds: dict[str, list[float]] = {}
    for step, seconds in found.steps:
        entry = kinds.setdefault(step.kind, [0, 0.0, 0.0])
        entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + step.work, entry[2] + seconds
    rows = [
        (kind, f"{count:.0f}", f"{work:,.0f}", f"{paces[kind].start:.1f}", f"{1 / paces[kind].per_unit:.1f}" if paces[kind].per_unit else "-",
         f"{paces[kind].num_steps} at {paces[kind].num_sizes} sizes", f"{seconds:.0f}")
        for kind, (count, work, seconds) in kinds.items()
    ]  # fmt: skip
    rows.append(("between steps", str(len(found.steps)), "", f"{runs.overhead_per_step:.1f}", "", "", f"{found.overhead:.0f}"))
    rows.append(("all", "", "", "", "", "", f"{found.seconds:.0f}"))
    return format_table(("step", "times", "work", "start, s", "a second", "measured", "seconds"), rows)


def _checks(expected_seconds: float, found: TimeEstimate, runs: MeasuredRuns, run: Run) -> list[str]:
    left_out = leave_one_out(runs.steps)
    lines = [f"estimated: {found.seconds / 60:.1f} minutes"]
    if left_out.measured:
        run.metrics["time"]["left_out"] = {"estimated": left_out.estimated, "measured": left_out.measured, "unchecked": left_out.unchecked}
        lines.append(
            f"check: each measured step from the others of its kind: {left_out.estimated:.0f} s for {left_out.measured:.0f} s measured "
            f"({left_out.estimated / left_out.measured:.2f}); {left_out.unchecked:.0f} s are of steps with too few others"
        )
    if expected_seconds:
        ratio = found.seconds / expected_seconds
        run.metrics["time"] |= {"expected_seconds": expected_seconds, "ratio": ratio}
        lines.append(f"against the {expected_seconds:.0f} s that were measured: {ratio:.2f}")
    return lines
