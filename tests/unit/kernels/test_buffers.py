"""Memory for weights: alignment, size, and that it can be used."""

import pytest
import torch

from thinslice.kernels.buffers import HUGE_PAGE, empty_bytes


@pytest.mark.parametrize("num_bytes", [1, 64, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 77])
def test_aligned_and_writable(num_bytes: int) -> None:
    data = empty_bytes(num_bytes)
    assert data.dtype == torch.uint8
    assert data.numel() == num_bytes
    assert data.data_ptr() % 64 == 0
    data.fill_(7)
    assert int(data.sum(dtype=torch.int64)) == 7 * num_bytes


def test_views_keep_the_memory() -> None:
    part = empty_bytes(2 * HUGE_PAGE).fill_(3)[HUGE_PAGE:]
    assert int(part.sum(dtype=torch.int64)) == 3 * HUGE_PAGE
