"""Fixtures that several rooms' tests use."""

from pathlib import Path

import hypothesis
import pytest

from thinslice.store.store import Store

# How long an example takes says something of the machine, nothing of the code.
hypothesis.settings.register_profile("thinslice", deadline=None)
hypothesis.settings.load_profile("thinslice")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's .gguf file, fetched into the store where it is not there yet."""
    return Store().ensure("smollm2")
