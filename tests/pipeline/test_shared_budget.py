"""One budget for engines in several processes, on a real Ray."""

from pathlib import Path
from types import ModuleType

import pytest

from synpref_ray.errors import InputError, SpendingLimitError
from synpref_ray.llm.spending import SpendingRecord
from synpref_ray.pipeline.shared_budget import SharedBudget
from tests.llm.fakes import MemoryStorage


def spend(budget: SharedBudget, times: int) -> int:
    """Spend 0.25 of what is set aside (1.0), until the budget says no."""
    for done in range(times):
        try:
            name = None
            while name is None:
                name = budget.reserve(1.0, 1.0)
        except SpendingLimitError:
            return done
        budget.settle(name, 0.25)
    return times


@pytest.mark.ray
def test_processes_share_a_limit_and_the_record_stays(ray: ModuleType, tmp_path: Path) -> None:
    from synpref_ray.tables.storage import Storage

    record = SpendingRecord(Storage(str(tmp_path)), "spending")
    with SharedBudget.start(5.0, record, 3600.0) as budget:
        done = ray.get([ray.remote(num_cpus=0)(spend).remote(budget, 50) for _ in range(3)])
        # The last to be granted found at most 4.0 spent: 17 times 0.25 make 4.25.
        assert sum(done) == 17
        with pytest.raises(SpendingLimitError, match=r"the spending limit of 5 is reached: 4\.25 counts as spent"):
            budget.reserve(1.0, 0.0)
        last = budget.reserve(0.5, 0.0)
        assert last is not None
        assert budget.reserve(0.5, 0.0) is None  # never settled: its worker is dead
    assert record.read() == 4.75
    with SharedBudget.start(5.0, record) as budget, pytest.raises(SpendingLimitError, match=r"4\.75 of it by earlier runs"):
        budget.reserve(0.5, 0.0)


@pytest.mark.ray
def test_a_damaged_record_is_the_drivers_error(ray: ModuleType) -> None:
    storage = MemoryStorage()
    storage.write_bytes("spending/spent.json", b"{")
    with pytest.raises(InputError, match="is damaged"):
        SharedBudget.start(1.0, SpendingRecord(storage, "spending"))
