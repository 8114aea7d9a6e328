"""Memory for arrays: alignment, size, and that it can be used."""

import mmap

import numpy as np
import pytest

from thinslice.kernels.arrays import HUGE_PAGE, empty, empty_bytes, empty_in_small_pages


@pytest.mark.parametrize("num_bytes", [1, 64, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 77])
def test_aligned_and_writable(num_bytes: int) -> None:
    data = empty_bytes(num_bytes)
    assert data.dtype == np.uint8
    assert data.shape == (num_bytes,)
    assert data.ctypes.data % (HUGE_PAGE if num_bytes >= HUGE_PAGE else 64) == 0
    data.fill(7)
    assert int(data.sum(dtype=np.int64)) == 7 * num_bytes


def test_views_keep_the_memory() -> None:
    whole = empty_bytes(2 * HUGE_PAGE)
    whole.fill(3)
    part = whole[HUGE_PAGE:]
    del whole
    assert int(part.sum(dtype=np.int64)) == 3 * HUGE_PAGE


@pytest.mark.parametrize("has_large_pages", [True, False])
@pytest.mark.parametrize("num_rows", [1, HUGE_PAGE // 4, HUGE_PAGE])
def test_arrays_with_large_pages_and_where_the_system_has_none(
    num_rows: int, has_large_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_large_pages:  # as on macOS
        for name in ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"):
            monkeypatch.delattr(mmap, name, raising=False)
    for made in (empty((num_rows, 1), np.float32), empty_in_small_pages((num_rows, 1), np.float32)):
        made[:] = 3
        assert (made.shape, made.dtype, made.ctypes.data % 64) == ((num_rows, 1), np.float32, 0)
        assert int(made.sum()) == 3 * num_rows
