"""What steps have come to keep goes back to the system, and costs little time."""

import pytest

from thinslice.memory import give_back
from thinslice.units import MIB


class Heap:
    """A process whose heap steps fill, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trim_s: float = 0.0) -> None:
        self.now, self.trim_s = 0.0, trim_s
        self.held, self.in_use = 100, 100
        self.trims: list[int] = []
        monkeypatch.setattr(give_back.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(give_back, "anonymous_bytes", lambda: self.held * MIB)
        monkeypatch.setattr(give_back, "_trim", self.trim)
        self.memory = give_back.KeptMemory()
        self.memory.bound()
        self.trims.clear()

    def trim(self) -> None:
        self.trims.append(self.held)
        self.now += self.trim_s
        self.held = self.in_use

    def step(self, left: int, seconds: float = 1.0) -> None:
        self.held += left
        self.memory.bound()
        self.now += seconds


def test_what_steps_leave_goes_back_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, where every step fills the same pages that had been given back."""
    heap = Heap(monkeypatch)
    for left in (3, 0, 1, 2, 10, 4, 10):
        heap.step(left)
    assert heap.trims == [106, 110, 114]


def test_what_is_in_use_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(monkeypatch)
    heap.in_use = 300
    for _ in range(9):
        heap.step(0 if heap.held == 300 else 200)
    assert heap.trims == [300]


def test_what_the_program_let_go_lowers_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(monkeypatch)
    heap.step(-50)
    heap.in_use = 50
    heap.step(5)
    assert heap.trims == [55]


def test_returning_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(monkeypatch, trim_s=0.07)
    while heap.now < 70.0:
        heap.step(5 if heap.held < 110 else 0, seconds=0.003)
    assert 5 <= len(heap.trims) <= 11


def test_much_goes_back_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap(monkeypatch, trim_s=0.07)
    for _ in range(9):
        heap.step(10, seconds=0.003)
    assert heap.trims == [120, 120, 120, 120]


def test_what_others_hold_is_not_asked_for_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread takes 20 MiB and lets them go, again and again: none of it is the heap's."""
    heap = Heap(monkeypatch, trim_s=0.07)
    for _ in range(100):
        heap.in_use = 120
        heap.step(20, seconds=0.003)
        heap.in_use = 100
        heap.step(-20, seconds=0.003)
    assert heap.trims == [120]
