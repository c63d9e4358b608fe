"""Pools of embedded pairs on disk."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage


def clustered(count, size, seed, *, num_clusters=40, spread=0.5):
    """Unit vectors around random centres; every 50th has a twin."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_clusters, size))
    vectors = centres[rng.integers(num_clusters, size=count)] + spread * rng.normal(size=(count, size))
    vectors[1::50] = vectors[::50][: len(vectors[1::50])]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_embedded_pool(root, vectors, shard_rows, *, num_groups=97, missing=(), prefix=""):
    """A pool (pair_id and prompt_group alone) and its embeddings; shards of `shard_rows` rows, the second one empty."""
    storage, shards = Storage(str(root)), []
    rng = np.random.default_rng(len(vectors))
    ids = [f"{prefix}{name:08x}" for name in rng.permutation(len(vectors) * 7)[: len(vectors)]]
    groups = [f"g{group}" for group in rng.integers(num_groups, size=len(vectors))]
    schema = embeddings_schema(vectors.shape[1])
    cuts = [0, shard_rows, *range(shard_rows, len(vectors), shard_rows), len(vectors)]
    tables = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        pool_ids = pa.array(ids[start:stop], pa.string())
        shards.append(
            write_pool_shard(storage, "wild", number, pa.table({"pair_id": pool_ids, "prompt_group": pa.array(groups[start:stop], pa.string())}))
        )
        lost = pa.array([row in missing for row in range(start, stop)], pa.bool_())
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors[start:stop].reshape(-1)), vectors.shape[1], mask=lost)
        tables.append(pa.table([pool_ids, embedding, pa.nulls(stop - start, pa.string())], schema=schema))
    pool = commit_pool(storage, "wild", "f" * 32, shards, {})
    embeddings = Sidecar(pool, "embeddings", "e" * 32)
    for shard, table in zip(pool.shards, tables, strict=True):
        embeddings.write(shard.number, table)
    whole = pa.concat_tables(tables).select(["pair_id", "embedding"]).append_column("prompt_group", pa.array(groups, pa.string()))
    return pool, embeddings, whole
