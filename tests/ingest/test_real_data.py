"""Real human pairs come through whole: counts pinned, ids and duplicates checked against plain Python."""

from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray import schema
from synpref_ray.ingest import Route, SourceConfig, build_shard, index_chunk, ingest_plan, list_source_files, read_pair_file
from synpref_ray.ingest.chunk import Chunk
from synpref_ray.ingest.plan import ChunkIndex


def read(path: Path, route: Route = Route.WILD) -> tuple[SourceConfig, list[Chunk]]:
    source = SourceConfig(name=path.parent.name, path=str(path), route=route)
    return source, [chunk for file in list_source_files(source) for chunk in read_pair_file(file, source)]


@pytest.mark.parametrize(("file", "num_pairs"), [("hh_rlhf/train.parquet", 1456), ("hh_rlhf/test.parquet", 269), ("human_extra/train.parquet", 3376)])
def test_every_row_is_a_pair_and_none_contradicts_another(shared_data: Path, file: str, num_pairs: int) -> None:
    _, chunks = read(shared_data / file)
    assert (sum(chunk.pairs.num_rows for chunk in chunks), sum(chunk.rejects.num_rows for chunk in chunks)) == (num_pairs, 0)
    labels = {(repr(row["prompt"]), row["chosen"], row["rejected"]) for chunk in chunks for row in chunk.pairs.to_pylist()}
    assert len(labels) == num_pairs
    assert not any((prompt, rejected, chosen) in labels for prompt, chosen, rejected in labels)
    row = chunks[0].pairs.to_pylist()[0]
    assert row["pair_id"] == schema.pair_id(row["prompt"], row["chosen"], row["rejected"])
    assert len(row["source_id"]) == 20


def test_two_sources_make_two_pools(shared_data: Path) -> None:
    staged: list[pa.Table] = []
    indexes: list[ChunkIndex] = []
    # the wild source repeats the seed's file, so that all its pairs are duplicates
    for file, route in [("hh_rlhf/t*.parquet", Route.WILD), ("human_extra", Route.UNVERIFIED), ("hh_rlhf/train.parquet", Route.SEED)]:
        source, chunks = read(shared_data / file, route)
        staged.extend(chunk.pairs for chunk in chunks)
        indexes.extend(index_chunk(chunk.pairs, route, source.name, source.path) for chunk in chunks)
    plan = ingest_plan(indexes, max_pairs_per_shard=500)
    assert {route: sum(shard.num_pairs for shard in shards) for route, shards in plan.shards.items()} == {
        Route.SEED: 1456,
        Route.UNVERIFIED: 3376,
        Route.WILD: 269,
    }
    assert plan.num_duplicates() == {"hh_rlhf": 1456}
    assert sum(shard.num_contradicted for shards in plan.shards.values() for shard in shards) == 0
    last = plan.shards[Route.UNVERIFIED][-1]
    assert build_shard(last, staged.__getitem__).num_rows == 3376 - 6 * 500
