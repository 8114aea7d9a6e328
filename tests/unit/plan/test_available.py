"""Free memory, control group bounds and the default budget, read from files as the kernel writes
them."""

from pathlib import Path

import pytest

from thinslice.errors import BudgetError, ConfigError
from thinslice.plan import available
from thinslice.plan.available import GroupBound, budget_for_process
from thinslice.units import GIB, MIB


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine as it is said to be: free and total bytes, what this process holds, its groups."""
    state: dict[str, object] = {"free": 8 * GIB, "total": 16 * GIB, "own": GIB, "groups": []}
    fields = {"MemAvailable": "free", "MemTotal": "total"}
    monkeypatch.setattr(available, "_meminfo", lambda field: state[fields[field]])
    monkeypatch.setattr(available, "_own_bytes", lambda: state["own"])
    monkeypatch.setattr(available, "_group_bounds", lambda: state["groups"])
    return state


def test_a_group_has_a_bound_or_none(tmp_path: Path) -> None:
    write_group(tmp_path / "a", memory__max=f"{2 * GIB}\n", memory__current=f"{GIB}\n")
    write_group(tmp_path / "a/b", memory__max="max\n", memory__current="5\n")
    assert available._bound_of(tmp_path / "a") == GroupBound(2 * GIB, GIB)
    assert available._bound_of(tmp_path / "a/b") is None


@pytest.mark.parametrize("prefix", ["", "total_"])
def test_page_cache_that_can_be_given_back_is_not_held(tmp_path: Path, prefix: str) -> None:
    write_group(
        tmp_path,
        memory__max=f"{2 * GIB}",
        memory__current=f"{GIB}",
        memory__stat=f"anon 5\n{prefix}inactive_file {GIB - 3 * MIB}\n{prefix}active_file {MIB}\n",
    )
    assert available._bound_of(tmp_path) == GroupBound(2 * GIB, 2 * MIB)


def test_version_1_has_a_huge_number_for_no_bound(tmp_path: Path) -> None:
    write_group(
        tmp_path, memory__limit_in_bytes=f"{(1 << 63) - 4096}", memory__usage_in_bytes=f"{GIB}"
    )
    assert available._bound_of(tmp_path) is None


def test_what_this_process_holds_is_free_to_it(machine: dict[str, object]) -> None:
    assert available.free_memory() == 9 * GIB
    machine["groups"] = [GroupBound(4 * GIB, 3 * GIB), GroupBound(64 * GIB, GIB)]
    assert available.free_memory() == 2 * GIB


@pytest.mark.parametrize(
    ("own", "groups", "expected", "source"),
    [
        (GIB, [], 0.8 * 9, "80% of the 9.00 GiB that this machine has free"),
        (2 * GIB, [], 0.8 * 10, "80% of the 10.00 GiB that this machine has free"),
        # Nobody else in it, a supervisor beside, and a group that is shared.
        (
            GIB,
            [GroupBound(4 * GIB, GIB)],
            0.95 * 4,
            "95% of the 4.00 GiB that the control group of",
        ),
        (GIB, [GroupBound(4 * GIB, GIB + 256 * MIB)], 0.95 * 3.75, "95% of the 3.75 GiB"),
        (GIB, [GroupBound(4 * GIB, 3 * GIB)], 0.8 * 2, "80% of the 2.00 GiB that the control"),
        # The tightest of several, and one that is wider than the machine.
        (GIB, [GroupBound(4 * GIB, GIB), GroupBound(2 * GIB, GIB)], 0.95 * 2, "95% of the 2.00"),
        (GIB, [GroupBound(64 * GIB, GIB)], 0.8 * 9, "80% of the 9.00 GiB that this machine"),
        (3 * GIB, [GroupBound(2 * GIB, GIB)], 0.95 * 2, "95% of the 2.00"),
        (GIB, [GroupBound(2 * GIB, 5 * GIB)], 0, "80% of the 0"),
    ],
)
def test_the_default_is_a_share_of_what_this_process_can_have(
    own: int,
    groups: list[GroupBound],
    expected: float,
    source: str,
    machine: dict[str, object],
) -> None:
    machine |= {"own": own, "groups": groups}
    budget = budget_for_process(None)
    assert 0 <= expected * GIB - budget.num_bytes < 8 * MIB
    assert budget.num_bytes % (8 * MIB) == 0
    assert budget.source is not None
    assert budget.source.startswith(source)


def test_a_named_budget_is_taken_up_to_what_there_is(machine: dict[str, object]) -> None:
    """More than is free may be right, for others may let go; more than there is cannot be."""
    for named in (1, 9 * GIB, 16 * GIB):
        assert budget_for_process(named) == available.Budget(named)
    with pytest.raises(BudgetError, match=r"--host-memory 17GiB is more than this machine has: 16"):
        budget_for_process(17 * GIB, "--host-memory")
    machine["groups"] = [GroupBound(512 * MIB, 0), GroupBound(2 * GIB, 0)]
    assert budget_for_process(512 * MIB).num_bytes == 512 * MIB
    with pytest.raises(BudgetError, match=r"control group may hold: 512\.00 MiB; --memory 512MiB"):
        budget_for_process(513 * MIB)


def test_a_system_that_tells_nothing_wants_a_number(machine: dict[str, object]) -> None:
    machine |= {"free": None, "total": None}
    with pytest.raises(ConfigError, match="name --host-memory"):
        budget_for_process(None, "--host-memory")
    assert budget_for_process(1 << 60).num_bytes == 1 << 60


def test_a_budget_of_a_card_leaves_a_fifth() -> None:
    assert available.default_budget(10 * GIB) == 8 * GIB
