"""The lock of a model: gone after use, also after a failure, and never held by two at once."""

import threading
from pathlib import Path

import pytest

from thinslice.errors import StoreError
from thinslice.store.changes import hold_packed
from thinslice.store.progress import silent

FOLDER = "tiny-int4"


def test_work_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "models"

    def fail() -> None:
        with hold_packed(root, FOLDER, silent):
            assert list(root.rglob("*.lock"))
            raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        fail()
    assert not list(root.rglob("*.lock"))


def test_a_lock_that_is_held_is_an_error_for_who_does_not_wait(tmp_path: Path) -> None:
    with (
        hold_packed(tmp_path, FOLDER, silent),
        pytest.raises(StoreError, match="another process is packing packed/tiny-int4"),
        hold_packed(tmp_path, FOLDER, None),
    ):
        pass


def test_one_at_a_time_although_each_removes_the_lock(tmp_path: Path) -> None:
    num_inside, most_inside, num_done = 0, 0, 0

    def work() -> None:
        nonlocal num_inside, most_inside, num_done
        for _ in range(10):
            with hold_packed(tmp_path / "models", FOLDER, silent):
                num_inside += 1
                most_inside = max(most_inside, num_inside)
                num_inside -= 1
                num_done += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most_inside, num_done) == (1, 40)
