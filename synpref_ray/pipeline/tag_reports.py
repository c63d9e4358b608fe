"""What the taggers of a stage are worth, from their stored tags: against each other, and against tags that people edited (Sec. 3.1)."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from synpref_ray.evaluation.tag_report import read_human_tags, tag_quality, tagger_agreement
from synpref_ray.pipeline.tag_steps import TaggedPools
from synpref_ray.schema import stable_hash
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar, zip_shard

SAMPLE_PAIRS = 20_000
"""Our choice: agreement between taggers is taken over whole shards, drawn by hash from all pools, until so many pairs are reached."""
_COLUMNS = ("task_category", "objectivity", "controversiality", "desired_attributes", "annotation_guideline", "drop_reason")


def report_taggers(pools: Sequence[Pool], tagged: TaggedPools, human_path: str = "") -> dict[str, Any]:
    """Return how far the taggers agree, and, given a file of human-edited tags, the quality of each tagger and of the merged tags.

    Args:
        human_path: "" for none, else a file for `read_human_tags`; its pairs are looked up in all pools.

    Returns:
        `num_pairs` that agreement was taken over, `null_rows` and `between_taggers` of `tagger_agreement`, and `quality`: `tag_quality`
        `by_tagger` and of the `merged` tags; plain values.

    Raises:
        InputError: the file is missing, unreadable, or has a value that no attribute can have.
    """
    sample = {name: _drawn_rows(pools, sidecars) for name, sidecars in tagged.by_tagger.items()}
    report: dict[str, Any] = {"num_pairs": min(table.num_rows for table in sample.values()), **tagger_agreement(sample)}
    if human_path:
        human = read_human_tags(human_path)
        of_tagger = {name: tag_quality(_rows_of(pools, sidecars, human["pair_id"]), human) for name, sidecars in tagged.by_tagger.items()}
        report["quality"] = {"by_tagger": of_tagger, "merged": tag_quality(_rows_of(pools, tagged.merged, human["pair_id"]), human)}
    return report


def _drawn_rows(pools: Sequence[Pool], sidecars: Sequence[Sidecar]) -> pa.Table:
    found, num_rows = [], 0
    for table in _shards(pools, sidecars, drawn=True):
        found.append(table)
        num_rows += table.num_rows
        if num_rows >= SAMPLE_PAIRS:
            break
    return pa.concat_tables(found)


def _rows_of(pools: Sequence[Pool], sidecars: Sequence[Sidecar], pair_ids: pa.ChunkedArray) -> pa.Table:
    wanted = pair_ids.combine_chunks()
    return pa.concat_tables([table.filter(pc.is_in(table["pair_id"], value_set=wanted)) for table in _shards(pools, sidecars)])


def _shards(pools: Sequence[Pool], sidecars: Sequence[Sidecar], *, drawn: bool = False) -> Iterator[pa.Table]:
    shards = [(pool, sidecar, shard.number) for pool, sidecar in zip(pools, sidecars, strict=True) for shard in pool.shards]
    if drawn:
        shards.sort(key=lambda place: stable_hash(0, f"{place[0].name}/{place[2]}", "tag-report"))
    for pool, sidecar, number in shards:
        yield zip_shard(pool, number, ["prompt_group"], [(sidecar, {name: name for name in _COLUMNS})])
