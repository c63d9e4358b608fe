"""Seeded vectors for `retrieval.py`, made like embeddings of prompts lie, and written as a pool with an embeddings sidecar.

A mixture of mixtures: a common direction (embeddings of one model are never centred), 64 domains, one topic in every 200 pairs with sizes by Zipf's
law, prompts of a topic, and six prompts for every ten pairs, whose attributes move them a little. All of it lies in a spectrum that falls as
dimension^-0.35 and is turned by a random rotation, so that no dimension is special and few carry much. A shard depends on seed and number alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.tables.pools import Pool, Shard, commit_pool, open_pool, pool_exists, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.tables.storage import Storage

POOL, ROWS_PER_SHARD = "synthetic", 8192
NUM_DOMAINS, PAIRS_PER_TOPIC, PROMPTS_PER_PAIR = 64, 200, 0.6
COMMON, DOMAIN, TOPIC, PROMPT, ATTRIBUTES = 0.25, 0.45, 0.55, 0.55, 0.2
SPECTRUM = -0.35
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Mixture:
    """The centres of all topics, with the common direction and their domains in them, and how often each comes."""

    seed: int
    rotation: Matrix
    topics: Matrix
    shares: npt.NDArray[np.float64]

    @classmethod
    def make(cls, num_pairs: int, dimension: int, seed: int) -> "Mixture":
        """Draw the mixture for a pool of so many pairs."""
        rng = np.random.default_rng([seed, 0])
        rotation = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0].astype(np.float32)
        num_topics = max(NUM_DOMAINS, num_pairs // PAIRS_PER_TOPIC)
        common, domains = _spread(rng, 1, rotation), _spread(rng, NUM_DOMAINS, rotation)
        of_domain = rng.integers(NUM_DOMAINS, size=num_topics)
        topics = COMMON * common + DOMAIN * domains[of_domain] + TOPIC * _spread(rng, num_topics, rotation)
        shares = 1.0 / (np.arange(num_topics) + 10.0)
        return cls(seed, rotation, topics, shares / shares.sum())

    def draw(self, number: int, count: int) -> tuple[Matrix, npt.NDArray[np.int64]]:
        """Return `count` unit vectors of shard `number`, and for each the prompt (of this shard) that it is of."""
        rng = np.random.default_rng([self.seed, 1, number])
        num_prompts = max(1, round(PROMPTS_PER_PAIR * count))
        topics = rng.choice(len(self.topics), num_prompts, p=self.shares)
        prompts = self.topics[topics] + PROMPT * _spread(rng, num_prompts, self.rotation)
        of_pair = rng.integers(num_prompts, size=count)
        vectors = prompts[of_pair] + ATTRIBUTES * _spread(rng, count, self.rotation)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), of_pair


def _spread(rng: np.random.Generator, count: int, rotation: Matrix) -> Matrix:
    """Return vectors of about unit length with the falling spectrum, turned."""
    scale = (np.arange(len(rotation)) + 1.0) ** SPECTRUM
    drawn = rng.normal(size=(count, len(rotation))).astype(np.float32) * (scale / np.linalg.norm(scale)).astype(np.float32)
    return np.asarray(drawn @ rotation, dtype=np.float32)


def make_pool(storage: Storage, num_pairs: int, dimension: int, seed: int) -> tuple[Pool, Sidecar]:
    """Write (or reopen) the pool of such vectors, a narrow one, and its embeddings."""
    name = fingerprint("synthetic embeddings", 1, {"pairs": num_pairs, "dimension": dimension, "seed": seed}, {})
    if not pool_exists(storage, POOL):
        commit_pool(storage, POOL, name, list(_write_shards(storage, num_pairs, Mixture.make(num_pairs, dimension, seed), name)), {})
    pool = open_pool(storage, POOL)
    if pool.fingerprint != name:
        raise OSError(f"{storage.url} holds vectors of another size or seed: name another folder with --work")
    return pool, Sidecar(pool, "embeddings", name)


def _write_shards(storage: Storage, num_pairs: int, mixture: Mixture, name: str) -> Iterator[Shard]:
    nothing = Pool(storage, POOL, 0, name, ())
    schema = embeddings_schema(len(mixture.rotation))
    for number, first in enumerate(range(0, num_pairs, ROWS_PER_SHARD)):
        count = min(ROWS_PER_SHARD, num_pairs - first)
        vectors, prompts = mixture.draw(number, count)
        ids = pa.array([f"{row * 0x9E3779B97F4A7C15 % (1 << 64):032x}" for row in range(first, first + count)], pa.string())
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        Sidecar(nothing, "embeddings", name).write(number, pa.table([ids, embedding, pa.nulls(count, pa.string())], schema=schema))
        groups = pa.array([f"{number}-{prompt}" for prompt in prompts.tolist()], pa.string())
        yield write_pool_shard(storage, POOL, number, pa.table({"pair_id": ids, "prompt_group": groups}))


def make_queries(num_pairs: int, dimension: int, seed: int, count: int) -> Matrix:
    """Return vectors of the same mixture that are in no shard: gold pairs whose neighbours are asked for."""
    return Mixture.make(num_pairs, dimension, seed).draw(1 << 40, count)[0]
