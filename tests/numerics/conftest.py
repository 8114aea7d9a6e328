"""Fixtures for the compiled kernels: restored after each test."""

from collections.abc import Iterator

import pytest

from thinslice.kernels import native


@pytest.fixture
def kernels() -> Iterator[None]:
    """The compiled kernels, with the instruction set and threads put back afterwards."""
    assert native.is_available(), native.describe()
    isa, threads = native.isa(), native.num_threads()
    yield
    native.set_isa(isa)
    native.set_num_threads(threads)
