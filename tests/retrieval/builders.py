"""Small tables of embedded pairs."""

import numpy as np
import pyarrow as pa


def embedded(ids, groups, vectors, **columns):
    """A table of pairs; a vector of None is a pair without an embedding."""
    size = next((len(vector) for vector in vectors if vector is not None), 2)
    rows = [None if vector is None else [float(value) for value in vector] for vector in vectors]
    return pa.table(
        {
            "pair_id": pa.array(ids, pa.string()),
            "prompt_group": pa.array(groups, pa.string()),
            "embedding": pa.array(rows, pa.list_(pa.float32(), size)),
            **columns,
        }
    )


def unit(*angles):
    """Unit vectors in the plane, by angle in degrees: nearer angles are nearer pairs."""
    return [(np.cos(np.radians(angle)), np.sin(np.radians(angle))) for angle in angles]
