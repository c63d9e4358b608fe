"""Exact duplicates and contradicting labels, found over arrays of ids alone.

Paper: Sec. 3 pools many overlapping public sets; how overlaps are resolved is left open. Our choice: the first of several equal pairs (same
`pair_id`) in input order is kept and the later ones are rejects; two pairs of one comparison with opposite labels are both kept and marked
`contradicted`, because which of them is right is for Stage 1 and Stage 2 to say.

Shapes: N ids in input order, each 128 bits as two unsigned 64-bit words, (N, 2). Both kinds of id of 40M pairs take 1.3 GB, and finding the
duplicates about 3 GB more.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ids = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_ID_DIGITS = 32
_NO_DIGIT = 255
_DIGIT_VALUES = np.full(256, _NO_DIGIT, np.uint8)
_DIGIT_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


class Duplicates(NamedTuple):
    """What the ids of all pairs say about each, (N,) in input order."""

    keep: Flags
    """True for the first occurrence of a pair."""
    first: Positions
    """Position of the first occurrence; a kept pair's own."""
    contradicted: Flags
    """True for kept pairs whose comparison was also kept with the other label."""


def parse_ids(column: pa.Array | pa.ChunkedArray) -> Ids:
    """Return ids of 32 hex digits as (N, 2) words that sort like the text."""
    parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate([np.empty((0, 2), np.uint64), *(_parse_part(part) for part in parts)])


def find_duplicates(pair_ids: Ids, comparison_ids: Ids) -> Duplicates:
    """Find the later copies of equal pairs and the comparisons that were kept with both labels."""
    order, starts = _sort_groups(pair_ids)
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    keep = first == np.arange(len(order))
    kept = np.flatnonzero(keep)
    order, starts = _sort_groups(comparison_ids[kept])
    sizes = np.diff(starts, append=len(order))
    contradicted = np.zeros(len(keep), np.bool_)
    contradicted[kept[order]] = np.repeat(sizes > 1, sizes)
    return Duplicates(keep, first, contradicted)


def _sort_groups(ids: Ids) -> tuple[Positions, Positions]:
    """Return positions sorted by id, equal ids in input order, and where in that order each group of equal ids starts."""
    order = np.lexsort((ids[:, 1], ids[:, 0])).astype(np.int64, copy=False)
    is_start = np.zeros(len(order), np.bool_)
    is_start[:1] = True
    for word in (0, 1):
        sorted_word = ids[order, word]
        is_start[1:] |= sorted_word[1:] != sorted_word[:-1]
    return order, np.flatnonzero(is_start)


def _parse_part(part: pa.Array) -> Ids:
    if len(part) == 0:
        return np.empty((0, 2), np.uint64)
    text = part.cast(pa.string())
    assert text.null_count == 0, "ids are never null"
    assert pc.all(pc.equal(pc.binary_length(text), _ID_DIGITS)).as_py(), "ids are 32 hex digits"
    start = np.frombuffer(text.buffers()[1], np.int32)[text.offset]
    digits = np.frombuffer(text.buffers()[2], np.uint8)[start : start + _ID_DIGITS * len(text)].reshape(len(text), _ID_DIGITS)
    values = _DIGIT_VALUES[digits]
    assert values.max() != _NO_DIGIT, "ids are lower-case hex digits"
    packed: npt.NDArray[np.uint8] = np.ascontiguousarray((values[:, 0::2] << 4) | values[:, 1::2])
    return packed.view(">u8").astype(np.uint64)
