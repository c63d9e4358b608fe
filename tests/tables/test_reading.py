"""Shards read at once: in order, together, a bounded number, and no further than the first error."""

import threading
from collections.abc import Iterator

import pytest

from synpref_ray.tables.reading import READS_AT_ONCE, read_each


def test_results_come_in_order_and_reads_go_on_together() -> None:
    together = threading.Barrier(READS_AT_ONCE, timeout=60)  # nobody passes unless so many read at once

    def read(number: int) -> int:
        together.wait()
        return -number

    assert list(read_each(read, range(3 * READS_AT_ONCE))) == [-number for number in range(3 * READS_AT_ONCE)]
    assert list(read_each(read, [])) == []


def test_a_slow_consumer_holds_a_bounded_number() -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    for consumed, _ in enumerate(read_each(lambda number: number, numbers()), start=1):
        assert taken <= consumed + 2 * READS_AT_ONCE
    assert taken == 1000


def test_the_first_error_ends_it() -> None:
    read: list[int] = []

    def fail(number: int) -> int:
        read.append(number)
        if number == 3:
            raise OSError("gone")
        return number

    with pytest.raises(OSError, match="gone"):
        list(read_each(fail, range(10_000)))
    assert len(read) <= 4 + 2 * READS_AT_ONCE
