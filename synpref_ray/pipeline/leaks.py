"""Overlaps with benchmarks before judges: proposals of ingest are gathered, judged, decided, and written beside the pools as `decontamination`.

Paper: App. C (v3): n-grams of 5 to 13 words on the whole triple propose, a judge strikes false alarms, what it confirms is dropped. Our choice:
ingest reports the overlaps (`decontamination/` in the workspace); here every one that a pool still holds is put to the judges, once for each
benchmark item; the decision is a column that Stage 1, Stage 2 and exports honour, and nothing is deleted. The report at the end holds all proposals
as rows in the driver, some 1.4 KB each: ten million take 14 GB.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from synpref_ray.errors import ConfigError
from synpref_ray.ingest.decontamination import FULL_NGRAM, MIN_NGRAM, DecontaminateConfig, MatchKind
from synpref_ray.ingest.source import Route
from synpref_ray.llm.journal import Journal
from synpref_ray.llm.leak_judge import LEAK_PROMPT_VERSION, LEAK_VOTES_SCHEMA, LeakJudgeConfig, judge_leaks
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.leak_proposals import PROPOSAL_NAMES, PROPOSALS_SCHEMA, check_compared, gather_proposals
from synpref_ray.pipeline.llm_steps import LLMStepConfig, LLMWorker, names_differ, run_llm_step
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.rules.leaks import LEAK_SCHEMA, LEAKS, LEAKS_SCHEMA, LeakReason, decide_leak, merge_proposals
from synpref_ray.schema import GATHERED_FIELDS, DropReason
from synpref_ray.tables.pools import Pool, list_pools, open_pool
from synpref_ray.tables.selection import GATHERED_SHARD_PAIRS
from synpref_ray.tables.sidecars import Sidecar, zip_shard

JUDGE_LEAKS_VERSION = 1
DECIDE_LEAKS_VERSION = 1


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
    proposals = gather_proposals(config.storage, pools, config.decontaminate, **sizes)
    run.step("propose", rows=sum(pool.num_rows for pool in pools), computed=0, rejected={}, seconds=0.0, proposed=proposals.num_rows)
    votes = [_judge(run, proposals, step) for step in config.judges]
    decisions = _decide(run, proposals, votes)
    leaks = [_scatter(run, pool, proposals, decisions) for pool in pools]
    report = _report(proposals, votes, decisions)
    path = f"decontamination/judged/{decisions.fingerprint[:8]}.parquet"
    config.storage.write_table(path, report)
    run.metrics["decontamination"] = {
        "proposals": proposals.name,
        "report": path,
        "sidecars": {pool.name: sidecar.fingerprint for pool, sidecar in zip(pools, leaks, strict=True)},
        "pairs": {pool.name: _count_pairs(sidecar) for pool, sidecar in zip(pools, leaks, strict=True)},
        "judges": {sidecar.name.removeprefix("leak_votes."): dict(sidecar.manifest["rejected"]) for sidecar in votes},
        "benchmarks": _count_proposals(report),
    }
    return _closing_table(run.metrics["decontamination"], config.storage.join(path))


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
    """Puts the decisions beside a source pool's pairs."""

    def __init__(self, source: str, decisions: Sidecar):
        self._source = source
        self._decisions = decisions

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        decided = _by_place(self._decisions).get((self._source, key.number), {})
        rows = []
        for row, pair_id in enumerate(shard["pair_id"].to_pylist()):
            found = decided.get(row)
            if found is None:
                rows.append({"pair_id": pair_id, "num_proposals": 0})
            else:
                rows.append({**merge_proposals(found), "pair_id": pair_id, "num_proposals": len(found)})
        return pa.Table.from_pylist(rows, schema=LEAKS_SCHEMA), {}


@lru_cache(maxsize=1)
def _by_place(decisions: Sidecar) -> dict[tuple[str, int], dict[int, list[dict[str, Any]]]]:
    """Return the decided proposals by source pool and shard, then row; read once in a process."""
    places = tuple(field.name for field in GATHERED_FIELDS)
    found: dict[tuple[str, int], dict[int, list[dict[str, Any]]]] = {}
    for shard in decisions.pool.shards:
        columns = {"leak_decision": "leak_decision", "leak_reason": "leak_reason"}
        for row in zip_shard(decisions.pool, shard.number, (*places, *PROPOSAL_NAMES), [(decisions, columns)]).to_pylist():
            found.setdefault((row["source_pool"], row["source_shard"]), {}).setdefault(row["source_row"], []).append(row)
    return found


def _scatter(run: Run, pool: Pool, proposals: Pool, decisions: Sidecar) -> Sidecar:
    step = Step(
        name="scatter leaks",
        version=DECIDE_LEAKS_VERSION,
        worker=ScatterLeaksWorker,
        outputs=(Output(LEAKS, LEAKS_SCHEMA),),
        settings={},
        digests={"proposals": proposals.digest, "decisions": decisions.fingerprint},
        worker_arguments=lambda _: {"source": pool.name, "decisions": decisions},
    )
    result = run_step(step, [StepInput(pool, ())])
    run.step(f"{step.name}, {pool.name}", rows=result.rows, computed=result.rows_computed, rejected={}, seconds=result.seconds)
    return result.sidecars[0][0]


def _report(proposals: Pool, votes: Sequence[Sidecar], decisions: Sidecar) -> pa.Table:
    """Return a line a proposal: the pair and where it stands, the item, the words, what each judge said (`verdicts`), what they say together."""
    columns = ("source", *(field.name for field in GATHERED_FIELDS), *PROPOSAL_NAMES)
    decided = {name: name for name in LEAK_SCHEMA.names if name != "pair_id"}
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(decisions, decided)]
    beside += [(sidecar, {"votes": f"votes.{number}"}) for number, sidecar in enumerate(votes)]
    names = [f"votes.{number}" for number in range(len(votes))]
    verdicts = pa.field("verdicts", pa.list_(pa.string()))
    fields = [PROPOSALS_SCHEMA.field(name) for name in ("pair_id", *columns)]
    schema = pa.schema([*fields, *(field for field in LEAK_SCHEMA if field.name != "pair_id"), verdicts])
    rows = []
    for shard in proposals.shards:
        for row in zip_shard(proposals, shard.number, columns, beside).to_pylist():
            said = [f"{vote['judge']}/{vote['order']}/{vote['sample']}: {vote['verdict']}" for name in names for vote in row[name] or ()]
            rows.append({**row, "verdicts": said})
    return pa.Table.from_pylist(rows, schema=schema)


def _count_pairs(leaks: Sidecar) -> dict[str, int]:
    """Return how many pairs of a pool each reason holds for; pairs that nothing proposes are not among them."""
    counts: Counter[str] = Counter()
    for shard in leaks.pool.shards:
        counts.update(reason for reason in leaks.read(shard.number, ["leak_reason"])["leak_reason"].to_pylist() if reason is not None)
    return dict(sorted(counts.items()))


def _count_proposals(report: pa.Table) -> dict[str, dict[str, dict[str, int]]]:
    """Return by benchmark and by kind (candidates: and by length) what became of the proposals."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for row in report.select(["benchmark", "kind", "n", "leak_reason"]).to_pylist():
        kind = f"{row['kind']}_{row['n']:02d}" if row["kind"] == MatchKind.CANDIDATE else row["kind"]
        found.setdefault(row["benchmark"], {}).setdefault(kind, Counter())[row["leak_reason"]] += 1
    return {benchmark: {kind: dict(sorted(counts.items())) for kind, counts in sorted(kinds.items())} for benchmark, kinds in sorted(found.items())}


def _closing_table(metrics: Mapping[str, Any], report: str) -> str:
    rows = []
    for pool, counts in metrics["pairs"].items():
        rows += [(f"pairs of {pool}", _REASON_WORDS[LeakReason(reason)], str(count)) for reason, count in counts.items()]
        rows += [] if counts else [(f"pairs of {pool}", "nothing to judge", "0")]
    for benchmark, kinds in metrics["benchmarks"].items():
        rows += [(benchmark, f"{kind}: {reason}", str(count)) for kind, counts in kinds.items() for reason, count in counts.items()]
    lines = [format_table(("overlaps with benchmarks", "", "count"), rows), f"item, pair, words and votes of every overlap: {report}"]
    unread = sum(sum(count for reason, count in counts.items() if reason != DropReason.NOT_SELECTED) for counts in metrics["judges"].values())
    if unread:
        lines.append(f"{unread} times a judge gave no vote that could be read (too long, unreadable, refused): such pairs are kept")
    return "\n".join(lines)


_REASON_WORDS = {
    LeakReason.CONFIRMED: "a leak: dropped",
    LeakReason.CLEARED: "a coincidence: kept",
    LeakReason.UNDECIDED: "the judges do not agree: kept",
    LeakReason.NOT_JUDGED: "no judge could say: kept",
}
