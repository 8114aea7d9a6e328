"""Free memory and control group bounds, read from files as the kernel writes them."""

from pathlib import Path

import pytest

from thinslice.plan import available
from thinslice.units import GIB, MIB


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_tightest_bound_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    write_group(tmp_path / "a", memory__max=f"{2 * GIB}\n", memory__current=f"{GIB}\n")
    write_group(tmp_path / "a/b", memory__max="max\n", memory__current="5\n")
    assert available._bound_of(tmp_path / "a") == (2 * GIB, GIB)
    assert available._bound_of(tmp_path / "a/b") is None


def test_page_cache_that_can_be_given_back_is_not_held(tmp_path: Path) -> None:
    write_group(
        tmp_path,
        memory__max=f"{2 * GIB}",
        memory__current=f"{GIB}",
        memory__stat=f"anon 5\ninactive_file {GIB - MIB}\n",
    )
    assert available._bound_of(tmp_path) == (2 * GIB, MIB)


def test_version_1_has_a_huge_number_for_no_bound(tmp_path: Path) -> None:
    write_group(
        tmp_path, memory__limit_in_bytes=f"{(1 << 63) - 4096}", memory__usage_in_bytes=f"{GIB}"
    )
    assert available._bound_of(tmp_path) is None


def test_free_memory_is_the_lower_of_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_meminfo", lambda field: 8 * GIB)
    monkeypatch.setattr(available, "cgroup_bound", lambda: (4 * GIB, 3 * GIB))
    assert available.free_memory() == GIB
    monkeypatch.setattr(available, "cgroup_bound", lambda: (64 * GIB, GIB))
    assert available.free_memory() == 8 * GIB
    monkeypatch.setattr(available, "cgroup_bound", lambda: None)
    assert available.free_memory() == 8 * GIB


def test_the_default_budget_leaves_a_fifth() -> None:
    assert available.default_budget(10 * GIB) == 8 * GIB
    assert available.default_budget(10 * GIB + 12345) % MIB == 0
