"""Small well-formed tables for tests."""

import pyarrow as pa

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
