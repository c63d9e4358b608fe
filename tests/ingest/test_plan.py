"""The plan: every pair is in one shard or among the duplicates, pools by trust, shards within their ceilings."""

import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray.ingest.chunk import REJECTS_SCHEMA, normalise_rows
from synpref_ray.ingest.plan import INDEX_COLUMNS, ChunkIndex, IngestPlan, build_shard, duplicate_rejects, index_chunk, ingest_plan
from synpref_ray.ingest.source import Route, SourceConfig
from synpref_ray.schema import POOL_SCHEMA

Pair = tuple[str, str, str]


class Staged:
    """Chunks as a job would stage them."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.indexes: list[ChunkIndex] = []

    def add(self, route: Route, source: str, pairs: list[Pair], first_row: int = 0) -> "Staged":
        rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
        config = SourceConfig(name=source, path="x", route=route)
        table = normalise_rows(rows, config, file=f"{source}.jsonl", first_row=first_row).pairs
        self.tables.append(table)
        self.indexes.append(index_chunk(table.select(list(INDEX_COLUMNS)), route, source, f"{source}.jsonl"))
        return self

    def read(self, chunk: int) -> pa.Table:
        return self.tables[chunk]

    def pool(self, plan: IngestPlan, route: Route) -> list[tuple[Pair, bool]]:
        rows = [row for shard in plan.shards[route] for row in build_shard(shard, self.read).to_pylist()]
        return [((row["prompt"][0]["content"], row["chosen"], row["rejected"]), row["contradicted"]) for row in rows]


A, B, C, D = ("p", "1", "2"), ("q", "1", "2"), ("r", "1", "2"), ("s", "1", "2")
A_OTHER = ("p", "2", "1")


def test_the_more_trusted_pool_keeps_a_pair() -> None:
    staged = Staged().add(Route.WILD, "web", [A, B, C]).add(Route.SEED, "paper", [B, D, B]).add(Route.UNVERIFIED, "people", [C, A_OTHER], 10)
    plan = ingest_plan(staged.indexes)
    assert staged.pool(plan, Route.SEED) == [(B, False), (D, False)]
    assert staged.pool(plan, Route.UNVERIFIED) == [(C, False), (A_OTHER, True)]
    assert staged.pool(plan, Route.WILD) == [(A, True)]
    assert [shard.num_contradicted for route in Route for shard in plan.shards[route]] == [0, 1, 1]
    assert plan.num_duplicates() == {"paper": 1, "web": 2}
    rejects = pa.concat_tables([duplicate_rejects(part, staged.read) for part in plan.duplicates])
    assert rejects.schema == REJECTS_SCHEMA
    firsts = {(row["source"], row["row"]): json.loads(row["row_json"])["first"] for row in rejects.to_pylist()}
    assert firsts == {
        ("paper", 2): {"source": "paper", "file": "paper.jsonl", "row": 0},
        ("web", 1): {"source": "paper", "file": "paper.jsonl", "row": 0},
        ("web", 2): {"source": "people", "file": "people.jsonl", "row": 10},
    }
    assert set(rejects["reason"].to_pylist()) == {"duplicate"}
    web = [json.loads(row["row_json"]) for row in rejects.to_pylist() if row["source"] == "web"]
    assert [(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in web] == [B, C]


def test_ceilings() -> None:
    pairs = [(f"p{n}", "1" * (100 if n != 4 else 5000), "2") for n in range(10)]
    staged = Staged().add(Route.WILD, "web", pairs[:3]).add(Route.WILD, "web", pairs[3:], 3)
    by_count = ingest_plan(staged.indexes, max_pairs_per_shard=4).shards[Route.WILD]
    assert [(shard.number, shard.num_pairs, [part.chunk for part in shard.parts]) for shard in by_count] == [
        (0, 4, [0, 1]),
        (1, 4, [1]),
        (2, 2, [1]),
    ]
    one_pair = int(staged.tables[0]["num_bytes"][0].as_py())
    by_bytes = ingest_plan(staged.indexes, max_bytes_per_shard=3 * one_pair).shards[Route.WILD]
    assert [shard.num_pairs for shard in by_bytes] == [3, 1, 1, 3, 2]
    for shard in (*by_count, *by_bytes):
        table = build_shard(shard, staged.read)
        assert table.schema == POOL_SCHEMA
        assert table.num_rows == shard.num_pairs
        assert table.nbytes <= shard.num_bytes


@pytest.mark.parametrize("chunks", [[], [[]], [[], [A], []]])
def test_nothing_or_little(chunks: list[list[Pair]]) -> None:
    staged = Staged()
    for pairs in chunks:
        staged.add(Route.SEED, "s", pairs)
    plan = ingest_plan(staged.indexes)
    assert [len(plan.shards[route]) for route in Route] == [min(1, sum(map(len, chunks))), 0, 0]
    assert plan.duplicates == ()


PAIRS = st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from(["1", "2", "3"]), st.sampled_from(["4", "1"])), max_size=8)
CHUNKS = st.lists(st.tuples(st.sampled_from(list(Route)), PAIRS), max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CHUNKS, st.integers(1, 5))
def test_every_pair_is_in_one_shard_or_a_duplicate(chunks: list[tuple[Route, list[Pair]]], max_pairs: int) -> None:
    staged = Staged()
    for number, (route, pairs) in enumerate(chunks):
        staged.add(route, f"s{number}", [pair for pair in pairs if pair[1] != pair[2]])
    plan = ingest_plan(staged.indexes, max_pairs_per_shard=max_pairs)
    pools = [entry for route in Route for entry in staged.pool(plan, route)]
    distinct = {pair for _, pairs in chunks for pair in pairs if pair[1] != pair[2]}
    assert sorted(pair for pair, _ in pools) == sorted(distinct)
    assert all(contradicted == ((pair[0], pair[2], pair[1]) in distinct) for pair, contradicted in pools)
    num_duplicates = sum(duplicate_rejects(part, staged.read).num_rows for part in plan.duplicates)
    assert len(pools) + num_duplicates == sum(table.num_rows for table in staged.tables)
    assert all(shard.num_pairs <= max_pairs for shards in plan.shards.values() for shard in shards)
    assert all([shard.number for shard in shards] == list(range(len(shards))) for shards in plan.shards.values())


def test_cutting_files_into_other_chunks_changes_no_shard() -> None:
    pairs = [(f"p{n % 5}", str(n % 3), str(n % 2 + 5)) for n in range(40)]
    whole = Staged().add(Route.WILD, "web", pairs)
    cut = Staged()
    for start in range(0, 40, 7):
        cut.add(Route.WILD, "web", pairs[start : start + 7], start)
    plans = [(staged, ingest_plan(staged.indexes, max_pairs_per_shard=9)) for staged in (whole, cut)]
    shards = [[build_shard(shard, staged.read) for shard in plan.shards[Route.WILD]] for staged, plan in plans]
    assert all(left.equals(right) for left, right in zip(*shards, strict=True))
    numbers = [[row["row"] for part in plan.duplicates for row in duplicate_rejects(part, staged.read).to_pylist()] for staged, plan in plans]
    assert numbers == [list(range(30, 40))] * 2  # n % 5, n % 3 and n % 2 repeat after 30
