"""Overlaps with benchmarks before judges: proposals of ingest are gathered, judged, decided, and written beside the pools as `decontamination`.

Paper: App. C (v3): n-grams of 5 to 13 words on the whole triple propose, a judge strikes false alarms. Our choice: what it confirms is dropped;
ingest reports the overlaps (`decontamination/` in the workspace); here every one that a pool still holds is put to the judges, once for each
benchmark item; the decision is a column that Stage 1, Stage 2 and exports honour, and nothing is deleted. Proposals are read shard by shard: who
writes the decisions beside a source shard holds one decided proposal for each of its pairs and a shard of proposals at a time, and the driver holds a
row group of the report (`leak_report.py`); none of it grows with the number of proposals. What gathering them takes, `leak_proposals.py` says.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.errors import ConfigError
from synpref_ray.ingest.benchmark_prompts import DecontaminateConfig
from synpref_ray.ingest.decontamination import FULL_NGRAM, MIN_NGRAM
from synpref_ray.ingest.source import Route
from synpref_ray.llm.journal import Journal
from synpref_ray.llm.leak_judge import LEAK_PROMPT_VERSION, LEAK_VOTES_SCHEMA, LeakJudgeConfig, judge_leaks
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.leak_proposals import PROPOSAL_NAMES, Proposals, check_compared, gather_proposals
from synpref_ray.pipeline.leak_report import closing_table, count_pairs, write_report
from synpref_ray.pipeline.llm_steps import LLMStepConfig, LLMWorker, names_differ, run_llm_step
from synpref_ray.pipeline.shard_io import without_shards
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.rules.leaks import LEAK_SCHEMA, LEAKS, LEAKS_SCHEMA, decide_leak, merge_proposals
from synpref_ray.tables.pools import Pool, list_pools, open_pool
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sidecars import Sidecar, zip_shard

JUDGE_LEAKS_VERSION = 1
DECIDE_LEAKS_VERSION = 1
_PLACE = ("source_pool", "source_shard", "source_row")


class LeakJudgeStepConfig(LLMStepConfig):
    """One judge of overlaps and its engine."""

    judge: LeakJudgeConfig


LeakJudges = Annotated[tuple[LeakJudgeStepConfig, ...], Field(min_length=1), names_differ("judge", lambda step: step.judge.judge)]


class LeaksConfig(JobConfig):
    """Which overlaps are judged, and by whom."""

    judges: LeakJudges
    decontaminate: DecontaminateConfig
    """The benchmarks, as ingest was given them: judges read their prompts."""
    pools: tuple[str, ...] = ()
    """Names of pools that ingest made; none means those of seed, unverified and wild that there are."""
    min_words: int = Field(default=MIN_NGRAM, ge=MIN_NGRAM, le=FULL_NGRAM)  # App. C (v3); higher asks about fewer pairs
    gathered_shard_pairs: int = Field(default=GATHERED_SHARD_PAIRS, ge=1)
    """Pairs in a file of a gathered pool: what an LLM step finishes at once."""


def check_leaks(config: LeaksConfig) -> None:
    """Check pools, benchmarks and the judges' models, without loading one."""
    pools = _open_pools(config)
    if not config.decontaminate.benchmarks:
        raise ConfigError("decontaminate.benchmarks is empty: name the benchmarks that ingest was given")
    check_compared(pools, config.decontaminate)
    for step in config.judges:
        step.check()


def _open_pools(config: LeaksConfig) -> list[Pool]:
    names = config.pools or tuple(route.value for route in Route if route.value in list_pools(config.storage))
    if len(set(names)) != len(names):
        raise ConfigError(f"pools: {', '.join(names)}: each pool once")
    return [open_pool(config.storage, name) for name in names or (Route.SEED.value,)]


def run_leaks(config: LeaksConfig, run: Run) -> str:
    """Judge the overlaps of all pools and make the sidecar `decontamination` of each; return the closing table."""
    pools = _open_pools(config)
    sizes = {"min_words": config.min_words, "max_pairs": config.gathered_shard_pairs}
    gathered = gather_proposals(config.storage, pools, config.decontaminate, **sizes)
    proposals = gathered.pool
    run.step("propose", rows=sum(pool.num_rows for pool in pools), computed=0, rejected={}, seconds=0.0, proposed=proposals.num_rows)
    votes = [_judge(run, proposals, step) for step in config.judges]
    decisions = _decide(run, proposals, votes)
    leaks = [_scatter(run, pool, gathered, decisions) for pool in pools]
    path = f"decontamination/judged/{decisions.fingerprint[:8]}.parquet"
    benchmarks = write_report(path, proposals, votes, decisions)
    run.metrics["decontamination"] = {
        "proposals": proposals.name,
        "report": path,
        "sidecars": {pool.name: sidecar.fingerprint for pool, sidecar in zip(pools, leaks, strict=True)},
        "pairs": {pool.name: count_pairs(sidecar) for pool, sidecar in zip(pools, leaks, strict=True)},
        "judges": {sidecar.name.removeprefix("leak_votes."): dict(sidecar.manifest["rejected"]) for sidecar in votes},
        "benchmarks": benchmarks,
    }
    return closing_table(run.metrics["decontamination"], config.storage.join(path))


class LeakJudgeWorker(LLMWorker[LeakJudgeStepConfig]):
    """Judges overlaps with benchmark items."""

    def ask(self, shard: pa.Table, journal: Journal) -> tuple[pa.Table, Mapping[str, float]]:
        """Return LEAK_VOTES_SCHEMA."""
        return judge_leaks(shard, self._engine, self._config.judge, journal), {}


def _judge(run: Run, proposals: Pool, config: LeakJudgeStepConfig) -> Sidecar:
    step = Step(
        name="judge leaks",
        title=f"judge leaks ({config.judge.judge})",
        version=JUDGE_LEAKS_VERSION,
        worker=LeakJudgeWorker,
        outputs=(Output(f"leak_votes.{config.judge.judge}", LEAK_VOTES_SCHEMA),),
        settings={**config.settings, "judge": config.judge.model_dump(mode="json"), "prompt": LEAK_PROMPT_VERSION},
        digests=config.digests,
        worker_arguments=lambda tables: {"config": config, "tables": tables},
        resources=config.resources,
        max_failed_fraction=config.max_failed_fraction,
    )
    columns = ("prompt", "chosen", "rejected", "field", "ngram", "benchmark_prompt")
    return run_llm_step(run, step.title, step, [StepInput(proposals, columns)], config)[0][0]


class DecideLeakWorker:
    """Merges what all judges say of each proposal."""

    def __init__(self, num_judges: int):
        self._names = [f"votes.{number}" for number in range(num_judges)]

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        rows = []
        for row in shard.to_pylist():
            found = decide_leak(vote for name in self._names for vote in row[name] or ())
            verdict = found.verdict.value if found.verdict else None
            decided = {"vote_reason": found.votes.value, "leak_decision": found.decision.value, "leak_reason": found.reason.value}
            rows.append({"pair_id": row["pair_id"], "leak_verdict": verdict, **decided})
        return pa.Table.from_pylist(rows, schema=LEAK_SCHEMA), {}


def _decide(run: Run, proposals: Pool, votes: Sequence[Sidecar]) -> Sidecar:
    step = Step(
        name="decide leaks",
        version=DECIDE_LEAKS_VERSION,
        worker=DecideLeakWorker,
        outputs=(Output("leak", LEAK_SCHEMA),),
        settings={"judges": [sidecar.name for sidecar in votes]},
        worker_arguments=lambda _: {"num_judges": len(votes)},
    )
    beside = tuple((sidecar, {"votes": f"votes.{number}"}) for number, sidecar in enumerate(votes))
    result = run_step(step, [StepInput(proposals, (), beside)])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    return result.sidecars[0][0]


class ScatterLeaksWorker:
    """Puts the decisions beside a source pool's pairs.

    Args:
        source: the pool's name.
        about: by its shards' numbers, the numbers of the shards of proposals that are about them.
        decisions: the sidecar `leak` of the proposals.
    """

    def __init__(self, source: str, about: Mapping[int, Sequence[int]], decisions: Sidecar):
        self._source = source
        self._about = about
        self._decisions = decisions

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        decided = self._read_decided(key.number)
        rows = [{**decided.get(row, {"num_proposals": 0}), "pair_id": pair_id} for row, pair_id in enumerate(shard["pair_id"].to_pylist())]
        return pa.Table.from_pylist(rows, schema=LEAKS_SCHEMA), {}

    def _read_decided(self, number: int) -> dict[int, Mapping[str, Any]]:
        """Return by row of a source shard the proposal that decides, and how many there are (`num_proposals`)."""
        columns = {"leak_decision": "leak_decision", "leak_reason": "leak_reason"}
        found: dict[int, Mapping[str, Any]] = {}
        for gathered in self._about.get(number, ()):
            table = zip_shard(self._decisions.pool, gathered, (*_PLACE, *PROPOSAL_NAMES), [(self._decisions, columns)])
            mine = pc.and_(pc.equal(table["source_pool"], self._source), pc.equal(table["source_shard"], number))
            for row in table.filter(mine).to_pylist():
                before = found.get(row["source_row"])
                best = merge_proposals([row] if before is None else [before, row])
                found[row["source_row"]] = {**best, "num_proposals": 1 if before is None else before["num_proposals"] + 1}
        return found


def _scatter(run: Run, pool: Pool, proposals: Proposals, decisions: Sidecar) -> Sidecar:
    arguments = {"source": pool.name, "about": proposals.about.get(pool.name, {}), "decisions": without_shards(decisions)}
    step = Step(
        name="scatter leaks",
        version=DECIDE_LEAKS_VERSION,
        worker=ScatterLeaksWorker,
        outputs=(Output(LEAKS, LEAKS_SCHEMA),),
        settings={},
        digests={"proposals": proposals.pool.digest, "decisions": decisions.fingerprint},
        worker_arguments=lambda _: arguments,
    )
    result = run_step(step, [StepInput(pool, ())])
    run.step(f"{step.name}, {pool.name}", rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    return result.sidecars[0][0]
