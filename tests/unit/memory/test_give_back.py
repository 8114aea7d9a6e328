"""What is free in the heap goes back when steps have left it, and is asked for seldom."""

from types import SimpleNamespace

import pytest

from thinslice.memory import give_back
from thinslice.units import MIB


def test_only_what_has_come_since_the_last_time_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Freed pieces between others stay counted when their pages have gone."""
    now, free, trims = 0.0, 0, []
    monkeypatch.setattr(give_back.time, "perf_counter", lambda: now)
    monkeypatch.setattr(give_back, "_trim", lambda: trims.append(free))
    memory = give_back.KeptMemory()
    memory._heap_state = lambda: SimpleNamespace(fordblks=free * MIB)
    for free in (3, 100, 100, 103, 105, 105, 90, 93, 95, 95):  # noqa: B007
        memory.bound()
        now += 1.0
    assert trims == [100, 105, 95]
    free = 200
    memory.bound()
    free = 300
    memory.bound()
    assert trims == [100, 105, 95, 200], "asked again at once"


def test_asking_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, 0

    def heap_state() -> SimpleNamespace:
        nonlocal now, asked
        now, asked = now + 0.07, asked + 1
        return SimpleNamespace(fordblks=0)

    monkeypatch.setattr(give_back.time, "perf_counter", lambda: now)
    memory = give_back.KeptMemory()
    memory._heap_state = heap_state
    while now < 70.0:
        memory.bound()
        now += 0.003
    assert asked <= 11
