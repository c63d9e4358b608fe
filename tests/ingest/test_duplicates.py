"""Exact duplicates and contradictions over id arrays, against plain dictionaries."""

import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray.ingest.duplicates import Ids, find_duplicates, parse_ids


def hex_id(name: object) -> str:
    return hashlib.blake2b(repr(name).encode(), digest_size=16).hexdigest()


def ids_of(names: list[object]) -> Ids:
    return parse_ids(pa.array([hex_id(name) for name in names], pa.string()))


def test_worked_example() -> None:
    pairs = [("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b"), ("q", "a", "b"), ("p", "a", "c"), ("p", "b", "a"), ("q", "a", "b")]
    found = find_duplicates(ids_of(list(pairs)), ids_of([(p, *sorted((c, r))) for p, c, r in pairs]))
    assert found.keep.tolist() == [True, True, False, True, True, False, False]
    assert found.first.tolist() == [0, 1, 0, 3, 4, 1, 3]
    assert found.contradicted.tolist() == [True, True, False, False, False, False, False]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
def test_equals_plain_dictionaries(labels: list[tuple[int, bool]]) -> None:
    found = find_duplicates(ids_of(list(labels)), ids_of([comparison for comparison, _ in labels]))
    first: dict[tuple[int, bool], int] = {}
    for position, label in enumerate(labels):
        first.setdefault(label, position)
    assert found.first.tolist() == [first[label] for label in labels]
    assert found.keep.tolist() == [first[label] == position for position, label in enumerate(labels)]
    both = [keep and (label[0], not label[1]) in first for keep, label in zip(found.keep, labels, strict=True)]
    assert found.contradicted.tolist() == both


def test_ids_that_share_one_half_differ() -> None:
    column = pa.array(["0" * 32, "0" * 31 + "1", "1" + "0" * 31, "0" * 32])
    found = find_duplicates(parse_ids(column), parse_ids(column))
    assert found.first.tolist() == [0, 1, 2, 0]


def test_parse_ids_keeps_order_and_value() -> None:
    texts = ["00000000000000010000000000000002", "ff00000000000000000000000000000a", "0123456789abcdef0123456789abcdef"]
    expected = np.array([[1, 2], [0xFF << 56, 10], [0x0123456789ABCDEF] * 2], np.uint64)
    whole = pa.array(["x" * 32, *texts], pa.string())
    assert np.array_equal(parse_ids(whole.slice(1)), expected)
    assert np.array_equal(parse_ids(pa.chunked_array([texts[:1], [], texts[1:]], pa.large_string())), expected)
    assert parse_ids(pa.chunked_array([], pa.string())).shape == (0, 2)
