"""No byte is promised to two models of one process."""

import threading

import pytest
import torch

from thinslice.memory import ledger as ledger_module
from thinslice.memory.ledger import Ledger, Reservation
from thinslice.memory.process_state import resident_bytes
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.units import GIB, MIB

HELD = 300 * MIB
PARTS = (("runtime", HELD), ("weights", 50 * MIB), ("kv cache", 64 * MIB), ("activations", MIB))
OWN = 115 * MIB


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger of a process that holds always the same."""
    monkeypatch.setattr(ledger_module, "rss_to_plan_from", lambda: HELD)
    return Ledger()


def reserve(made: Ledger) -> Reservation:
    with made.planning():
        return made.reserve(MemoryPlan(GIB, "int4", "bfloat16", 64, 32, 4, 4, 64, PARTS))


def test_the_next_plan_begins_above_what_the_models_will_hold(made: Ledger) -> None:
    first, second = reserve(made), reserve(made)
    assert made.runtime_bytes() == HELD + 2 * OWN
    first.release()
    assert made.runtime_bytes() == HELD + OWN
    del second  # a model that is let go without being closed
    assert made.runtime_bytes() == HELD


def test_what_is_held_is_not_counted_again(made: Ledger) -> None:
    reservation = reserve(made)
    cache = torch.empty(64 * MIB, dtype=torch.uint8)
    reservation.taken([cache])
    to_come = OWN - 50 * MIB
    assert to_come - 4 * MIB <= reservation.to_come_bytes() <= to_come
    cache[: 32 * MIB] = 1
    assert to_come - 36 * MIB <= reservation.to_come_bytes() <= to_come - 32 * MIB
    cache.fill_(1)
    assert reservation.to_come_bytes() == MIB
    reservation.release()
    assert reservation.to_come_bytes() == 0


def test_pages_of_memory_are_told_apart() -> None:
    rows = torch.empty(16 * MIB, dtype=torch.uint8)
    rows[8 * MIB : 9 * MIB] = 1
    there = resident_bytes(rows.data_ptr() + 8 * MIB, MIB)
    assert there == MIB
    assert resident_bytes(rows.data_ptr(), 0) == 0
    assert resident_bytes(rows.data_ptr() + 1, 1) <= 1


def test_plans_are_made_one_at_a_time(made: Ledger) -> None:
    begins: list[int] = []

    def plan() -> None:
        with made.planning() as runtime_bytes:
            begins.append(runtime_bytes)
            kept.append(made.reserve(MemoryPlan(GIB, "int4", "bfloat16", 64, 32, 4, 4, 64, PARTS)))

    kept: list[Reservation] = []
    threads = [threading.Thread(target=plan) for _ in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(begins) == [HELD + index * OWN for index in range(20)]
    with pytest.raises(AssertionError, match="others may have made"):
        made.reserve(MemoryPlan(GIB, "int4", "bfloat16", 64, 32, 4, 4, 64, PARTS))
