"""Money and pace, with times given by hand: nothing here waits."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.errors import InputError, SpendingLimitError
from synpref_ray.llm.pacing import Pacer
from synpref_ray.llm.spending import Ledger, LocalBudget, SpendingRecord
from tests.llm.fakes import MemoryStorage


def test_what_is_set_aside_counts_until_it_is_settled() -> None:
    ledger = Ledger(10.0)
    first, second = ledger.reserve(6.0), ledger.reserve(4.0)
    assert first is not None
    assert second is not None
    assert ledger.reserve(1.0) is None  # others may turn out cheaper
    ledger.settle(first, 2.0)
    assert ledger.spent == 6.0
    assert ledger.reserve(5.0) is None
    assert ledger.reserve(4.0) is not None
    ledger.settle(second, 4.0)
    with pytest.raises(
        SpendingLimitError, match=r"limit of 10 is reached: 6 counts as spent, and the next request may cost 4\.5; .*raise spending_limit"
    ):
        ledger.reserve(4.5)  # even if what is still set aside comes to nothing
    ledger.settle("unknown", 99.0)
    ledger.settle(first, 99.0)  # twice
    assert ledger.spent == 10.0


def test_a_dead_workers_money_is_spent_and_a_late_one_is_corrected() -> None:
    now = [0.0]
    ledger = Ledger(10.0, expires_seconds=60.0, clock=lambda: now[0])
    lost = ledger.reserve(8.0)
    assert ledger.reserve(3.0) is None
    now[0] = 60.0
    with pytest.raises(SpendingLimitError, match="8 counts as spent"):
        ledger.reserve(3.0)
    assert lost is not None
    ledger.settle(lost, 1.0)  # it was only slow
    assert ledger.spent == 1.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0001, 3.0), st.floats(0.0, 1.0), st.booleans()), max_size=60))
def test_the_limit_is_never_passed_and_the_record_is_never_behind(steps: list[tuple[float, float, bool]]) -> None:
    storage = MemoryStorage()
    record = SpendingRecord(storage, "spending")
    ledger = Ledger(10.0, record)
    open_ones: list[tuple[str, float]] = []
    for worst, share, settle in steps:
        try:
            name = ledger.reserve(worst)
        except SpendingLimitError:
            name = None
        if name is not None:
            open_ones.append((name, worst * share))
        assert ledger.spent <= 10.0
        assert record.read() >= ledger.spent  # a kill at this point forgets nothing
        if settle and open_ones:
            ledger.settle(*open_ones.pop(0))
        if open_ones:
            step = max(0.05, max(steps)[0])
            assert record.read() <= ledger.spent + 2 * step + 1e-6  # and counts little too much
    ledger.save()
    assert record.read() == ledger.spent


def test_a_run_that_was_killed_is_remembered_with_a_little_more_than_it_spent() -> None:
    storage = MemoryStorage()
    ledger = Ledger(10.0, SpendingRecord(storage, "spending"))
    for _ in range(30):
        name = ledger.reserve(0.1)
        assert name is not None
        ledger.settle(name, 0.1)
    next_run = Ledger(10.0, SpendingRecord(storage, "spending"))
    assert 3.0 <= next_run.spent <= 3.0 + 2 * 0.1  # twice the worst of one request
    with pytest.raises(SpendingLimitError, match=r"counts as spent, 3(\.\d+)? of it by earlier runs"):
        next_run.reserve(9.0)


class CountedStorage(MemoryStorage):
    """Counts what is written, and may be full."""

    num_writes, is_full = 0, False

    def write_bytes(self, path: str, data: bytes) -> None:
        """Keep one object."""
        if self.is_full:
            raise OSError("no space left")
        self.num_writes += 1
        super().write_bytes(path, data)


def test_the_record_comes_down_when_requests_turn_out_cheap_and_is_rarely_written() -> None:
    storage = CountedStorage()
    record = SpendingRecord(storage, "spending")
    ledger = Ledger(10.0, record)

    def burst() -> None:
        names = [ledger.reserve(0.02) for _ in range(64)]
        assert record.read() >= ledger.spent
        for name in names:
            assert name is not None
            ledger.settle(name, 0.0001)

    burst()
    assert ledger.spent == pytest.approx(0.0064)
    assert record.read() <= 0.0064 + 2 * 0.05  # a hundredth of the limit, though 1.28 had been set aside
    for _ in range(9):
        burst()
    # Ten times 1.28 up and down, at least 0.05 a write.
    assert storage.num_writes <= 2 * 10 * 1.28 / 0.05


def test_one_request_at_a_time_does_not_write_the_record_for_each() -> None:
    storage = CountedStorage()
    ledger = Ledger(10.0, SpendingRecord(storage, "spending"))
    for _ in range(100):
        name = ledger.reserve(2.0)
        assert name is not None
        ledger.settle(name, 0.001)
    assert storage.num_writes <= 3


def test_a_record_that_cannot_be_lowered_does_not_cost_a_reply(caplog: pytest.LogCaptureFixture) -> None:
    storage = CountedStorage()
    record = SpendingRecord(storage, "spending")
    ledger = Ledger(10.0, record)
    names = [ledger.reserve(1.0) for _ in range(9)]
    storage.is_full = True
    for name in names[:8]:
        assert name is not None
        ledger.settle(name, 0.0)
    assert "tried again: no space left" in caplog.text
    assert record.read() >= 9.0
    storage.is_full = False
    assert names[8] is not None
    ledger.settle(names[8], 0.0)
    assert record.read() <= 2.0


def test_who_never_spent_leaves_the_record_of_who_does_alone() -> None:
    storage = MemoryStorage()
    record = SpendingRecord(storage, "spending")
    first = Ledger(10.0, record)
    assert first.reserve(4.0) is not None
    second = Ledger(10.0, record)  # its driver finds the table taken
    assert first.reserve(4.0) is not None
    at_work = record.read()
    with pytest.raises(SpendingLimitError):
        second.reserve(9.0)
    second.settle("unknown", 3.0)
    second.save()
    assert record.read() == at_work >= 8.0
    untouched = MemoryStorage()
    LocalBudget(1.0, SpendingRecord(untouched, "spending")).save()
    assert untouched.objects == {}


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"spent": "x"}', b'{"spent": -1}', b'{"spent": NaN}'])
def test_a_damaged_record_is_an_error(damage: bytes) -> None:
    storage = MemoryStorage()
    storage.write_bytes("spending/spent.json", damage)
    with pytest.raises(InputError, match=r"spending/spent\.json is damaged"):
        Ledger(1.0, SpendingRecord(storage, "spending"))


def test_a_thread_waits_until_others_have_settled() -> None:
    budget = LocalBudget(1.0)
    held = budget.reserve(0.9, 0.0)
    assert held is not None
    assert budget.reserve(0.9, 0.0) is None
    got: list[str | None] = []
    waiter = threading.Thread(target=lambda: got.append(budget.reserve(0.9, 60.0)))
    waiter.start()
    budget.settle(held, 0.1)
    waiter.join(60)
    assert got[0] is not None
    assert budget.spent == 1.0


def test_tokens_are_paced_and_what_was_not_used_comes_back() -> None:
    now = [100.0]
    pacer = Pacer(0.0, 600.0, lambda: now[0])  # ten a second, one second's worth at once
    assert pacer.take(10) == 0.0
    assert pacer.take(20) == 0.0  # begins when the first ten have flowed in again
    assert pacer.take(5) == pytest.approx(2.0)
    pacer.give_back(10)  # of the twenty
    assert pacer.take(5) == pytest.approx(1.5)
    now[0] = 1000.0  # what nobody took does not pile up
    assert [pacer.take(10) for _ in range(3)] == pytest.approx([0.0, 0.0, 1.0])


def test_the_slower_of_both_limits_counts() -> None:
    pacer = Pacer(60.0, 6000.0, lambda: 0.0)
    assert [pacer.take(1) for _ in range(4)] == pytest.approx([0.0, 0.0, 1.0, 2.0])
    assert pacer.take(1) == pytest.approx(3.0)
    assert Pacer(0.0, 0.0, lambda: 0.0).take(10**9) == 0.0


def test_a_hold_only_grows() -> None:
    now = [0.0]
    pacer = Pacer(0.0, 0.0, lambda: now[0])
    pacer.hold(10.0)
    pacer.hold(3.0)
    now[0] = 4.0
    assert pacer.held_seconds() == pytest.approx(6.0)


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=80), st.integers(1, 120))
def test_no_minute_sees_more_requests_than_allowed(gaps: list[float], per_minute: int) -> None:
    now = [0.0]
    pacer = Pacer(float(per_minute), 0.0, lambda: now[0])
    sent = []
    for gap in gaps:
        now[0] += gap
        sent.append(now[0] + pacer.take(1))
    for start in sent:
        assert sum(start <= at < start + 60.0 for at in sent) <= per_minute * 61 / 60 + 1
