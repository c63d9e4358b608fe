"""All gold as the steps that need it get it: one gathered pool with its attributes, embeddings and verdicts.

Paper: Sec. 3.2 (gold exemplars in the judges' prompts; verified pairs as what everything else is measured by).
"""

from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.pools import Pool, content_digest
from synpref_ray.tables.sidecars import Sidecar, zip_shard

ATTRIBUTE_COLUMNS = {name: name for name in ATTRIBUTES_SCHEMA.names if name not in ("pair_id", "drop_reason")}


@dataclass(frozen=True)
class GoldTables:
    """All gold so far: a gathered pool and its sidecars. `tagged`: the same gold before people's edits of attributes; None: nobody edited any.

    `left_groups`: prompt groups of pairs that were gold until they were found to give benchmark items away.
    """

    pool: Pool
    attributes: Sidecar
    embeddings: Sidecar
    human: Sidecar
    tagged: "GoldTables | None" = None
    left_groups: frozenset[str] = frozenset()

    @property
    def as_targets(self) -> "GoldTables":
        """Gold as a judge meets any other pair, when it is measured on gold: with the taggers' attributes, and embeddings that follow from them."""
        return self.tagged or self

    @property
    def digest(self) -> str:
        """What names gold's pairs, and the prompts that it left."""
        return content_digest([self.pool.digest, sorted(self.left_groups)]) if self.left_groups else self.pool.digest

    def prompt_groups(self) -> frozenset[str]:
        """Return the prompt groups of all gold: no pair of theirs may train anything that gold checks.

        Our choice: those that gold left because they leak are among them. They are prompts of benchmark items: nothing of theirs is selected, makes
        silver, or is kept by Stage 2.
        """
        return _prompt_groups(self.pool) | self.left_groups

    def splits(self) -> pa.Table:
        """Return pair_id, prompt_group and gold_split of all gold: what the checks of `rules/gold.py` go by."""
        beside = [(self.human, {"gold_split": "gold_split"})]
        return pa.concat_tables([zip_shard(self.pool, shard.number, ["prompt_group"], beside) for shard in self.pool.shards]).combine_chunks()

    def read(self) -> pa.Table:
        """Return gold with its attributes and verdicts: pool columns, ATTRIBUTE_COLUMNS, human_verdict, gold_split."""
        columns = [name for name in self.pool.read(0).column_names if name != "pair_id"]
        beside = [(self.attributes, ATTRIBUTE_COLUMNS), (self.human, {"human_verdict": "human_verdict", "gold_split": "gold_split"})]
        return pa.concat_tables([zip_shard(self.pool, shard.number, columns, beside) for shard in self.pool.shards]).combine_chunks()


@lru_cache(maxsize=1)
def _prompt_groups(pool: Pool) -> frozenset[str]:
    """Return a gold pool's prompt groups, read once for all pools that a round labels."""
    return frozenset(pool.read_all(["prompt_group"])["prompt_group"].to_pylist())
