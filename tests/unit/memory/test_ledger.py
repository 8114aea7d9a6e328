"""No byte is promised to two models of one process."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_llm import write_model
from thinslice.config import SamplingParams
from thinslice.engine.llm import LLM
from thinslice.errors import BusyError
from thinslice.kernels.arrays import empty_bytes
from thinslice.memory import ledger as ledger_module
from thinslice.memory.ledger import Ledger, Reservation, ledger
from thinslice.memory.meter import resident_bytes
from thinslice.plan.memory_plan import MemoryPlan, Pool
from thinslice.units import GIB, MIB

HELD = 300 * MIB
PARTS = (
    ("runtime", HELD - 20 * MIB),
    ("tokenizer", 20 * MIB),
    ("weights", 50 * MIB),
    ("kv cache", 64 * MIB),
    ("activations", MIB),
)
OWN = 115 * MIB
PLAN = MemoryPlan((Pool("--memory", GIB, PARTS),), "int4", "bfloat16", 64, 32, 4, 4, 64)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger of a process that holds always the same."""
    monkeypatch.setattr(ledger_module, "rss_to_plan_from", lambda: HELD)
    return Ledger()


def reserve(made: Ledger) -> Reservation:
    with made.planning() as planning:
        return planning.reserve(PLAN)


def begins_at(made: Ledger) -> int:
    with made.planning() as planning:
        return planning.runtime_bytes


def test_a_plan_in_the_middle_of_another_is_refused(made: Ledger) -> None:
    """As from a signal handler: it would wait for itself, or promise the same bytes."""
    with made.planning(), pytest.raises(BusyError, match="a model is planned at this moment"):
        begins_at(made)
    assert begins_at(made) == HELD


def test_the_next_plan_begins_above_what_the_models_will_hold(made: Ledger) -> None:
    first, second = reserve(made), reserve(made)
    assert begins_at(made) == HELD + 2 * OWN
    first.release()
    assert begins_at(made) == HELD + OWN
    del second  # a model that is let go without being closed
    assert begins_at(made) == HELD


def test_what_is_held_is_not_counted_again(made: Ledger) -> None:
    reservation = reserve(made)
    cache = empty_bytes(64 * MIB)  # of its own: the heap may have pages that were in use before
    reservation.taken([cache])
    to_come = OWN - 50 * MIB
    assert to_come - 4 * MIB <= reservation.to_come_bytes() <= to_come
    cache[: 32 * MIB] = 1
    assert to_come - 36 * MIB <= reservation.to_come_bytes() <= to_come - 32 * MIB
    cache.fill(1)
    assert reservation.to_come_bytes() == MIB
    reservation.release()
    assert reservation.to_come_bytes() == 0


def test_pages_of_memory_are_told_apart() -> None:
    rows = np.empty(16 * MIB, np.uint8)
    rows[8 * MIB : 9 * MIB] = 1
    there = resident_bytes(rows.ctypes.data + 8 * MIB, MIB)
    assert there == MIB
    assert resident_bytes(rows.ctypes.data, 0) == 0
    assert resident_bytes(rows.ctypes.data + 1, 1) <= 1


def test_plans_are_made_one_at_a_time(made: Ledger) -> None:
    begins: list[int] = []

    def plan() -> None:
        with made.planning() as planning:
            begins.append(planning.runtime_bytes)
            kept.append(planning.reserve(PLAN))

    kept: list[Reservation] = []
    threads = [threading.Thread(target=plan) for _ in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(begins) == [HELD + index * OWN for index in range(20)]


def test_what_is_taken_while_a_plan_is_made_is_counted(
    made: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two looks, at the promises and at the process, weights may come."""
    reservation = reserve(made)
    held = HELD

    def look() -> int:
        nonlocal held
        reservation.taken([])
        held += 50 * MIB
        return held

    monkeypatch.setattr(ledger_module, "rss_to_plan_from", look)
    assert begins_at(made) >= HELD + OWN


def test_a_model_is_packed_in_its_own_room(made: Ledger) -> None:
    own, other = reserve(made), reserve(made)
    assert made.promised_bytes(but=own) == OWN == other.to_come_bytes()


def test_a_stream_keeps_the_reservation_of_a_model_that_was_let_go(tmp_path: Path) -> None:
    gc.collect()  # what other tests have let go of
    before = ledger().promised_bytes()
    llm = LLM(str(write_model(tmp_path / "tiny.gguf")), memory="2GiB", context=64)
    stream = llm.stream("Hello", SamplingParams(max_tokens=4, ignore_eos=True))
    del llm
    gc.collect()
    assert ledger().promised_bytes() > before
    assert len(list(stream)) > 0
    del stream
    gc.collect()
    assert ledger().promised_bytes() == before
