"""Memory for weights: alignment, size, and that it can be used."""

import numpy as np
import pytest

from thinslice.kernels.arrays import HUGE_PAGE, empty_bytes


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
