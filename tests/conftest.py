"""Fixtures that several rooms' tests use."""

from pathlib import Path

import pytest

from thinslice.store.store import Store


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's .gguf file, fetched into the store where it is not there yet."""
    return Store().ensure("smollm2")
