"""The unverified pool of Stage 1 as rounds read it: what joins between rounds is tagged and embedded when a round first comes to it.

Paper: Sec. 3.1 (tags), Sec. 3.2, Step 2 (embeddings) and Step 4 (newly gathered pairs join between iterations).
"""

from dataclasses import replace

from synpref_ray.pipeline.growth import RoundInputs, unverified_parts
from synpref_ray.pipeline.query_selection import Candidates
from synpref_ray.pipeline.retrieval import embed_pools
from synpref_ray.pipeline.stage_config import StageConfig
from synpref_ray.pipeline.tag_reports import report_taggers
from synpref_ray.pipeline.tag_steps import TaggedPools, tag_pools
from synpref_ray.reporting.run import Run
from synpref_ray.tables.parts import PartedSidecar, join_parts
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar


class UnverifiedParts:
    """The unverified pool with what is known about it, part by part as rounds come to read them.

    Args:
        human_tags: a file of attributes that people edited, for the taggers' report; empty: none.
        clusters: by which prompts are grouped.
    """

    def __init__(self, config: StageConfig, human_tags: str, run: Run, clusters: str):
        self._config = config
        self._human_tags = human_tags
        self._run = run
        self._clusters = clusters
        self.parts: list[Pool] = []
        self._attributes: list[Sidecar] = []
        self._embeddings: list[Sidecar] = []

    @property
    def attributes(self) -> Sidecar | PartedSidecar:
        """The attributes of all parts."""
        return join_parts(self._attributes)

    @property
    def embeddings(self) -> Sidecar | PartedSidecar:
        """The embeddings of all parts."""
        return join_parts(self._embeddings)

    @property
    def candidates(self) -> Candidates:
        """What a round selects from."""
        return Candidates(self.parts, self._embeddings)

    @property
    def num_rows(self) -> int:
        """Pairs in all parts."""
        return sum(part.num_rows for part in self.parts)

    def begin(self, seed: Pool, inputs: RoundInputs) -> tuple[Sidecar, Sidecar]:
        """Tag and embed the seed and what there is of the unverified pool; return the seed's attributes and embeddings."""
        tagged, embeddings = self._read("", inputs, [seed])
        pools = [seed, *self.parts]
        self._run.metrics["tag_report"] = report_taggers(pools, tagged, self._human_tags)
        return tagged.merged[0], embeddings[0]

    def extend(self, number: int, inputs: RoundInputs) -> None:
        """Tag and embed what has joined the pool before this round."""
        self._read(f", round {number}", inputs, [])

    @property
    def tables(self) -> list[Sidecar]:
        """What is known about the parts, table by table."""
        return [*self._attributes, *self._embeddings]

    def _read(self, suffix: str, inputs: RoundInputs, first: list[Pool]) -> tuple[TaggedPools, list[Sidecar]]:
        parts = [replace(part, clusters=self._clusters) for part in unverified_parts(self._config.storage, inputs)]
        new = parts[len(self.parts) :]
        if not new and not first:
            return TaggedPools([], {}), []
        tagged = tag_pools(self._run, f"tag{suffix}", [*first, *new], self._config.taggers)
        embeddings = embed_pools(self._run, f"embed{suffix}", list(zip([*first, *new], tagged.merged, strict=True)), self._config.embed)
        self.parts += new
        self._attributes += tagged.merged[len(first) :]
        self._embeddings += embeddings[len(first) :]
        return tagged, embeddings
