"""Small well-formed tables for tests."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.reward.packing import Segment
from synpref_ray.schema import POOL_SCHEMA, comparison_id, pair_id, prompt_group


def make_pairs(count: int, topic: str = "tea") -> pa.Table:
    """Return `count` distinct pairs of pool shape; replies differ in length, every prompt is of its own group."""
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"Say something about {topic} number {number}."}]
        chosen, rejected = f"{topic} is good" + "!" * number, f"no {topic}"
        rows.append(
            {
                "pair_id": pair_id(prompt, chosen, rejected),
                "comparison_id": comparison_id(prompt, chosen, rejected),
                "prompt_group": prompt_group(prompt),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "source": topic,
                "source_id": str(number),
                "contradicted": False,
            }
        )
    return pa.Table.from_pylist(rows, schema=POOL_SCHEMA)


def visible(segments: Sequence[Segment], window: int | None = None) -> npt.NDArray[np.bool_]:
    """Return the dense mask that segments stand for, shape (T, T): [query, key]; token by token, from the definition."""
    size = segments[-1].stop
    mask = np.zeros((size, size), dtype=bool)
    position = np.zeros(size, dtype=int)
    for segment in segments:
        for place, token in enumerate(range(segment.start, segment.stop)):
            position[token] = segment.prefix_stop - segment.prefix + place
            for key in (*range(segment.prefix, segment.prefix_stop), *range(segment.start, token + 1)):
                mask[token, key] = window is None or position[token] - position[key] < window
    return mask
