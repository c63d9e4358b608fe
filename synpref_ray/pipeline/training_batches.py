"""From a set of the workspace to planned batches, with no process that holds all of it: tokenise, count, pack (Paper: App. E; data flow ours).

1. tokenise: a sidecar of token ids beside every pool of the set, once per template; every training over the pool reads it.
2. count: how many pairs of every shard the set holds, so that windows of the epoch can be cut by arithmetic alone.
3. pack: for every window, read the token ids of its shards, apply the set's filter and labels, shuffle, cut into micro-batches, write.

All three run on Ray Data, shard by shard and window by window, and leave out what an earlier run has finished; small sets run in this process.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import SchemaError
from synpref_ray.pipeline.crashes import MAX_TASK_RETRIES
from synpref_ray.pipeline.steps import INLINE_ROWS, Output, Resources, ShardKey, Step, StepInput, run_step, unwrap
from synpref_ray.reporting.run import Run
from synpref_ray.reward.batch_store import write_window, written_windows
from synpref_ray.reward.model import load_tokenizer, read_row_layout
from synpref_ray.reward.render import OverLong, template_digest
from synpref_ray.reward.tokenise import tokenise_pairs
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_data import PairCounts, TrainingData, batch_spec, count_pairs, prepare_gold
from synpref_ray.reward.training_plan import TOKENS_SCHEMA, BatchSpec, Window, plan_window, plan_windows, usable
from synpref_ray.rules.flip import flip_pairs
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sets import Member, PairSet
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import versions_of

TOKENISE_VERSION = 1
TOKENISE_WORKERS = 4  # ours: one CPU each; a worker tokenises about a million tokens a second
PROCESS_BYTES = 600 << 20  # ours: a Ray worker with our libraries loaded
BYTES_PER_WINDOW_PAIR = 24_000  # ours: two conversations of 750 tokens as int32, held about four times over while they are packed


class TokeniseWorker:
    """Loads the tokenizer once per actor."""

    def __init__(self, backbone: str, max_length_tokens: int, over_long: OverLong):
        self._tokenizer = load_tokenizer(resolve_model(backbone, weights=False))
        self._max_length_tokens, self._over_long = max_length_tokens, over_long

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        table = tokenise_pairs(self._tokenizer, shard, self._max_length_tokens, self._over_long)
        tokens = pc.sum(pc.add(pc.list_value_length(table["chosen"]), pc.list_value_length(table["rejected"]))).as_py()
        return table, {"tokens": float(tokens or 0)}


@dataclass(frozen=True)
class SetShards:
    """The shards of a set, over the token sidecars of its pools (see `training_plan.TokenShards`); light enough to travel to every task."""

    members: tuple[Member, ...]
    tokens: tuple[Sidecar, ...]
    places: tuple[tuple[int, int], ...]
    """For every shard of the set: which member, and the number of the pool's shard."""
    counts: tuple[int, ...]
    left_out: Mapping[int, frozenset[str]]
    """For a shard of the set, ids of its pairs that repeat an earlier one: a comparison whose contradicting labels were settled the same way."""

    @property
    def names(self) -> Sequence[str]:
        return [f"{self.members[m].sidecar.pool.name}/{self.members[m].sidecar.name}/{number}" for m, number in self.places]

    def read(self, shard: int) -> pa.Table:
        """Return the set's pairs of one shard, flips applied, over-long ones left out."""
        member, number = self.places[shard]
        table = read_member_tokens(self.members[member], self.tokens[member], number)
        kept = pc.is_null(table["drop_reason"])
        if left_out := self.left_out.get(shard):
            kept = pc.and_(kept, pc.invert(pc.is_in(table["pair_id"], value_set=pa.array(sorted(left_out), pa.string()))))
        return table.filter(kept).select(TOKENS_SCHEMA.names).cast(TOKENS_SCHEMA)


def read_member_tokens(member: Member, tokens: Sidecar, number: int) -> pa.Table:
    """Return the token ids of the pairs that a member selects from one shard, under its labels: TOKENS_SCHEMA and `flipped`."""
    table = tokens.read(number)
    labels = member.sidecar.read(number, ["pair_id", *member.columns])
    if not labels["pair_id"].equals(table["pair_id"]):
        raise SchemaError(f"shard {number} of {tokens.pool.storage.join(tokens.folder)} does not hold the pairs of {member.sidecar.name!r} in order")
    found = {name: labels[name] for name in member.columns}
    wanted = member.wants(found)
    return flip_pairs(table.filter(wanted), member.flips(found).filter(wanted))


def prepare_set(run: Run, pairs: PairSet, gold: pa.Table | None, config: TrainConfig, backbone: str, storage: Storage, folder: str) -> TrainingData:
    """Plan the batches of a set and write them under `folder` and a digest of the plan.

    Raises:
        InputError: nothing of the set can be used.
    """
    tokenizer = load_tokenizer(resolve_model(backbone, weights=False))
    tokens = _tokenise(run, pairs, config, backbone, template_digest(tokenizer))
    shards, counts = count_shards(pairs.members, tokens)
    counts.require("train")
    spec = batch_spec(config, read_row_layout(resolve_model(backbone, weights=False), config.max_tokens_per_microbatch))
    windows = plan_windows(counts.pairs, spec)
    planned = [pairs.digest, repr(spec), shards.names, shards.counts, [sidecar.fingerprint for sidecar in tokens]]
    folder = f"{folder}-{content_digest(planned)[:8]}"  # other pairs, labels, tokens or another plan make other files
    pack_windows(shards, windows, spec, storage, folder)
    gold_batches, gold_counts = prepare_gold(tokenizer, gold, config, spec.layout)
    return TrainingData(storage, folder, len(windows), counts, gold_batches, gold_counts, template_digest(tokenizer))


def _tokenise(run: Run, pairs: PairSet, config: TrainConfig, backbone: str, digest: str) -> list[Sidecar]:
    """Return for every member the token ids of its pool."""
    pools: dict[str, Pool] = {member.sidecar.pool.digest: member.sidecar.pool for member in pairs.members}
    lengths = {"max_length_tokens": config.max_length_tokens, "over_long": config.over_long}
    many = sum(pool.num_rows for pool in pools.values()) > INLINE_ROWS
    step = Step(
        name="tokenise",
        version=TOKENISE_VERSION,
        worker=TokeniseWorker,
        outputs=(Output("tokens", TOKENS_SCHEMA),),
        settings={**lengths, "versions": versions_of("tokenizers", "transformers")},
        digests={"template": digest},
        worker_arguments=lambda _: {"backbone": backbone, **lengths},
        resources=Resources(TOKENISE_WORKERS if many else 0),
        max_failed_fraction=1.0,  # which pairs the set needs is counted below
    )
    result = run_step(step, [StepInput(pool, ("prompt", "chosen", "rejected")) for pool in pools.values()])
    run.step(step.name, rows=result.rows, computed=result.rows_computed, rejected=result.rejected, seconds=result.seconds)
    of_pool = dict(zip(pools, (outputs[0] for outputs in result.sidecars), strict=True))
    return [of_pool[member.sidecar.pool.digest] for member in pairs.members]


def count_shards(members: Sequence[Member], tokens: Sequence[Sidecar]) -> tuple[SetShards, PairCounts]:
    """Count a set's pairs shard by shard; return its shards and what became of its pairs."""
    places = tuple((m, shard.number) for m, member in enumerate(members) for shard in member.sidecar.pool.shards if shard.rows)
    light_members = tuple(replace(member, sidecar=_light(member.sidecar)) for member in members)
    count = _CountShard(light_members, tuple(_light(sidecar) for sidecar in tokens))
    found = _map(count, [{"member": m, "number": n} for m, n in places], sum(member.sidecar.pool.num_rows for member in members))
    by_place = {(row["member"], row["number"]): row for row in found}
    counts: list[int] = []
    left_out: dict[int, frozenset[str]] = {}
    dropped: Counter[str] = Counter()
    first: set[tuple[str, str]] = set()
    for shard, place in enumerate(places):
        row = by_place[place]
        repeated = []
        for name, comparison, preferred in row["contradicted"]:
            if (comparison, preferred) in first:
                repeated.append(name)
            first.add((comparison, preferred))
        if repeated:
            left_out[shard] = frozenset(repeated)
        counts.append(row["pairs"] - len(repeated))
        dropped.update(row["dropped"])
    shards = SetShards(light_members, count.tokens, places, tuple(counts), left_out)
    shortened, spelled = (sum(row[name] for row in by_place.values()) for name in ("shortened", "spelled"))
    return shards, PairCounts(sum(counts), dict(sorted(dropped.items())), shortened, spelled)


@dataclass(frozen=True)
class _CountShard:
    """Counts one shard; lists its contradicted pairs (few), since the driver must know which of them repeat each other."""

    members: tuple[Member, ...]
    tokens: tuple[Sidecar, ...]

    def __call__(self, place: dict[str, Any]) -> dict[str, Any]:
        member, number = self.members[place["member"]], place["number"]
        table = read_member_tokens(member, self.tokens[place["member"]], number)
        found, used = count_pairs(table), usable(table)
        beside = member.sidecar.pool.read(number, ["pair_id", "comparison_id", "contradicted"])
        beside = beside.filter(pc.and_(beside["contradicted"], pc.is_in(beside["pair_id"], value_set=used["pair_id"].combine_chunks())))
        comparisons = dict(zip(beside["pair_id"].to_pylist(), beside["comparison_id"].to_pylist(), strict=True))
        contradicted = []
        for row in used.filter(pc.is_in(used["pair_id"], value_set=pa.array(comparisons, pa.string()))).to_pylist():
            contradicted.append([row["pair_id"], comparisons[row["pair_id"]], str(row["chosen"])])
        return {**place, **asdict(found), "contradicted": contradicted}


def pack_windows(shards: SetShards, windows: Sequence[Window], spec: BatchSpec, storage: Storage, folder: str) -> None:
    """Write the windows that are not there yet."""
    done = written_windows(storage, folder)
    pending = [{"window": window.number} for window in windows if window.number not in done]
    biggest = max((sum(window.sizes) for window in windows), default=0)
    pack = _PackWindow(shards, tuple(windows), spec, storage, folder)
    _map(pack, pending, sum(shards.counts), memory=PROCESS_BYTES + biggest * BYTES_PER_WINDOW_PAIR)


@dataclass(frozen=True)
class _PackWindow:
    shards: SetShards
    windows: tuple[Window, ...]
    spec: BatchSpec
    storage: Storage
    folder: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        window = self.windows[row["window"]]
        write_window(self.storage, self.folder, window.number, plan_window(self.shards, window, self.spec))
        return row


def _map(function: Any, rows: Sequence[dict[str, Any]], num_pairs: int, memory: int = 0) -> Iterable[dict[str, Any]]:
    """Run `function` over rows: on Ray Data, one task a row, or in this process where a set is small."""
    if num_pairs <= INLINE_ROWS:
        return [function(row) for row in rows]
    if not rows:
        return []
    shared = ray.put(function)  # its list of shards is large; every task reads this one copy
    arguments: dict[str, Any] = {"max_retries": MAX_TASK_RETRIES, **({"memory": memory} if memory else {})}
    named = type(type(function).__name__.strip("_"), (_Call,), {})  # the operator's name in progress bars and on the dashboard
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(named(shared), **arguments)
    try:
        return [json.loads(row["json"]) for row in dataset.take_all()]
    except ray.exceptions.RayError as error:
        raise unwrap(error) from error


class _Call:
    def __init__(self, function: Any):
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"json": json.dumps(ray.get(self._function)(row))}  # nested values of varying shape, past Arrow's inference


def _light(sidecar: Sidecar) -> Sidecar:
    return replace(sidecar, pool=replace(sidecar.pool, shards=()))
