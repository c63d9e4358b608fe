"""Comparison and plan: every pair is in one shard or among the duplicates, pools by trust, shards within their ceilings, whatever the parts."""

import json
import random
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray.ingest.chunk import REJECTS_SCHEMA, normalise_rows, read_staged, write_staged
from synpref_ray.ingest.partition import Comparison, Gathered, IdWriter, Layout, PairFile
from synpref_ray.ingest.plan import IngestPlan, ShardPart, chunk_marks, cut_shards, duplicate_rejects, make_plan, pairs_path, take_part
from synpref_ray.ingest.source import Route, SourceConfig
from synpref_ray.schema import POOL_SCHEMA
from synpref_ray.tables.storage import Storage

Pair = tuple[str, str, str]
Kept = tuple[Pair, bool]


class Staged:
    """Files as a job would stage them, compared in small parts; in memory."""

    def __init__(self, pairs_per_piece: int = 5, pairs_per_part: int = 3) -> None:
        self.storage = Storage(f"memory://plan-{uuid.uuid4().hex}")
        self.pairs_per_piece = pairs_per_piece
        self.pairs_per_part = pairs_per_part
        self.files: list[PairFile] = []
        self.tables: list[pa.Table] = []

    def add(self, route: Route, source: str, *chunks: list[Pair], first_row: int = 0) -> "Staged":
        """Stage a file of some chunks."""
        folder = f"file-{len(self.files):05d}"
        ids = IdWriter(self.storage, folder, self.pairs_per_piece)
        config = SourceConfig(name=source, path="x", route=route)
        for number, pairs in enumerate(chunks):
            rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
            table = normalise_rows(rows, config, file=f"{source}.jsonl", first_row=first_row).pairs
            first_row += len(pairs)
            write_staged(self.storage, pairs_path(folder, number), table)
            self.tables.append(table)
            ids.add(table)
        ids.flush()
        self.files.append(PairFile(route, source, f"{source}.jsonl", folder, tuple(map(tuple, ids.pieces))))
        return self

    def compare(self) -> tuple[Comparison, list[Gathered]]:
        """Run the second and the third pass, tasks in any order."""
        comparison = Comparison.of(self.storage, f"compared-{self.pairs_per_part}", Layout.of(self.files), self.pairs_per_part)
        for part in random.sample(range(comparison.num_parts), comparison.num_parts):
            comparison.decide_part(part)
        return comparison, [comparison.gather_piece(piece) for piece in range(len(comparison.layout.pieces))]

    def plan(self, max_pairs: int = 100, max_bytes: int = 10**9) -> "Made":
        comparison, gathered = self.compare()
        return Made(comparison, make_plan(comparison, gathered, max_pairs_per_shard=dict.fromkeys(Route, max_pairs), max_bytes_per_shard=max_bytes))


class Made:
    """What the last pass would write."""

    def __init__(self, comparison: Comparison, plan: IngestPlan):
        self.comparison = comparison
        self.plan = plan

    def shards(self, route: Route) -> list[pa.Table]:
        parts: dict[int, list[ShardPart]] = {}
        for part in (part for task in self.plan.tasks if task.route is route for part in task.parts):
            parts.setdefault(part.shard, []).append(part)
        assert list(parts) == list(range(len(parts)))
        return [pa.concat_tables([self._take(part) for part in parts[number]]) for number in parts]

    def _take(self, part: ShardPart) -> pa.Table:
        pairs = read_staged(self.comparison.storage, part.chunk.path)
        return take_part(part, pairs, chunk_marks(self.comparison, part.chunk))

    def pool(self, route: Route) -> list[Kept]:
        rows = [row for shard in self.shards(route) for row in shard.to_pylist()]
        return [((row["prompt"][0]["content"], row["chosen"], row["rejected"]), row["contradicted"]) for row in rows]

    def rejects(self) -> list[pa.Table]:
        parts = [part for task in self.plan.tasks for part in task.duplicates]
        assert [part.number for part in parts] == list(range(len(parts)))
        found = [(read_staged(self.comparison.storage, part.chunk.path), chunk_marks(self.comparison, part.chunk)) for part in parts]
        return [duplicate_rejects(pairs, marks, self.comparison.layout) for pairs, marks in found]


A, B, C, D = ("p", "1", "2"), ("q", "1", "2"), ("r", "1", "2"), ("s", "1", "2")
A_OTHER = ("p", "2", "1")


def test_the_more_trusted_pool_keeps_a_pair() -> None:
    staged = (
        Staged().add(Route.WILD, "web", [A, B, C]).add(Route.SEED, "paper", [B, D, B]).add(Route.UNVERIFIED, "people", [C, A_OTHER], first_row=10)
    )
    made = staged.plan()
    assert made.pool(Route.SEED) == [(B, False), (D, False)]
    assert made.pool(Route.UNVERIFIED) == [(C, False), (A_OTHER, True)]
    assert made.pool(Route.WILD) == [(A, True)]
    assert made.plan.contradicted == {Route.SEED: 0, Route.UNVERIFIED: 1, Route.WILD: 1}
    assert made.plan.duplicates == {"paper": 1, "web": 2, "people": 0}
    assert made.plan.kept == {"paper": 2, "web": 1, "people": 2}
    rejects = pa.concat_tables(made.rejects())
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
    staged = Staged().add(Route.WILD, "web", pairs[:3], pairs[3:])
    by_count = staged.plan(max_pairs=4)
    parts = [(part.shard, part.chunk.path[-7], part.start, part.end) for task in by_count.plan.tasks for part in task.parts]
    assert parts == [(0, "0", 0, 3), (0, "1", 0, 1), (1, "1", 1, 5), (2, "1", 5, 7)]
    one_pair = int(staged.tables[0]["num_bytes"][0].as_py())
    by_bytes = staged.plan(max_bytes=3 * one_pair)
    assert [shard.num_rows for shard in by_bytes.shards(Route.WILD)] == [3, 1, 1, 3, 2]
    assert [len(task.parts) for task in by_bytes.plan.tasks] == [4, 1]  # shards 0 to 3, and the last
    for shard in by_bytes.shards(Route.WILD):
        assert shard.schema == POOL_SCHEMA
        assert shard.num_rows == 1 or shard.combine_chunks().nbytes <= 3 * one_pair


@pytest.mark.parametrize("chunks", [[], [[]], [[], [A], []]])
def test_nothing_or_little(chunks: list[list[Pair]]) -> None:
    made = Staged().add(Route.SEED, "s", *chunks).plan()
    assert [len(made.shards(route)) for route in Route] == [min(1, sum(map(len, chunks))), 0, 0]
    assert made.rejects() == []


def test_a_pool_of_duplicates_alone_has_no_shard_and_keeps_its_rejects() -> None:
    made = Staged().add(Route.SEED, "paper", [A, B]).add(Route.WILD, "web", [B], [], [A, A]).plan()
    assert made.shards(Route.WILD) == []
    assert [table["row"].to_pylist() for table in made.rejects()] == [[0], [1, 2]]


PAIRS = st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from(["1", "2", "3"]), st.sampled_from(["4", "1"])), max_size=8)
FILES = st.lists(st.tuples(st.sampled_from(list(Route)), st.lists(PAIRS, max_size=3)), max_size=5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES, st.integers(1, 5), st.integers(1, 6))
def test_every_pair_is_in_one_shard_or_a_duplicate(files: list[tuple[Route, list[list[Pair]]]], max_pairs: int, pairs_per_part: int) -> None:
    staged = Staged(pairs_per_part=pairs_per_part)
    files = [(route, [[pair for pair in pairs if pair[1] != pair[2]] for pairs in chunks]) for route, chunks in files]
    for number, (route, chunks) in enumerate(files):
        staged.add(route, f"s{number}", *chunks)
    made = staged.plan(max_pairs=max_pairs)
    in_order = [(route, pair) for wanted in Route for route, chunks in files if route is wanted for pairs in chunks for pair in pairs]
    distinct = {pair for _, pair in in_order}
    for route in Route:
        first = [pair for place, (own, pair) in enumerate(in_order) if own is route and pair not in {before for _, before in in_order[:place]}]
        assert made.pool(route) == [(pair, (pair[0], pair[2], pair[1]) in distinct) for pair in first]
        shards = [shard.num_rows for shard in made.shards(route)]
        assert all(size == max_pairs for size in shards[:-1])
    assert sum(table.num_rows for table in made.rejects()) == len(in_order) - len(distinct)


def test_chunks_pieces_and_parts_change_no_shard() -> None:
    pairs = [(f"p{n % 5}", str(n % 3), str(n % 2 + 5)) for n in range(40)]
    whole = Staged(1000, 1000).add(Route.WILD, "web", pairs).plan(max_pairs=9)
    cut = Staged(7, 2).add(Route.WILD, "web", *(pairs[start : start + 3] for start in range(0, 40, 3))).plan(max_pairs=9)
    assert (whole.comparison.num_parts, cut.comparison.num_parts) == (1, 20)
    assert all(left.equals(right) for left, right in zip(whole.shards(Route.WILD), cut.shards(Route.WILD), strict=True))
    numbers = [[number for table in made.rejects() for number in table["row"].to_pylist()] for made in (whole, cut)]
    assert numbers == [list(range(30, 40))] * 2  # n % 5, n % 3 and n % 2 repeat after 30


def test_a_comparison_that_was_done_is_not_done_again() -> None:
    staged = Staged(pairs_per_piece=2).add(Route.WILD, "web", [A, B], [A_OTHER, A]).add(Route.SEED, "s", [D])
    _, gathered = staged.compare()
    for path in staged.storage.list_files("file-00000"):
        staged.storage.delete(path)
    assert staged.compare()[1] == gathered
    assert [found.kept for found in gathered] == [(1,), (2,), (1,)]


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=6), st.integers(1, 7), st.integers(1, 20))
def test_shards_are_cut_the_same_from_any_pieces(parts: list[list[int]], max_pairs: int, max_bytes: int) -> None:
    sizes = [size for part in parts for size in part]
    wanted: list[list[int]] = []
    for size in sizes:
        if not wanted or len(wanted[-1]) == max_pairs or sum(wanted[-1]) + size > max_bytes:
            wanted.append([])
        wanted[-1].append(size)
    assert list(cut_shards((np.array(part, np.int64) for part in parts), max_pairs, max_bytes)) == [len(shard) for shard in wanted]
