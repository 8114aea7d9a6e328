"""Fixtures that several rooms' tests use."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Torch, which computes references, would have its threads spin while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from thinslice.kernels import native
from thinslice.store.store import Store

pytest_plugins = ["tests.own_browser", "tests.own_store", "tests.random_order"]
# A shell that runs tests in the background has interrupts ignored, here and in every child; the
# tests of Ctrl-C need the handler Python has otherwise.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says something of the machine, nothing of the code.
hypothesis.settings.register_profile("thinslice", deadline=None)
hypothesis.settings.load_profile("thinslice")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What ``make check-long`` gives, where ``make check`` draws a few cases."""
    parser.addoption("--long", action="store_true", help="every case, in full length")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only ``--long`` runs: as if it were not written, so that no run has skips."""
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long") is not None]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item.get_closest_marker("long") is None]


@pytest.fixture(scope="session")
def is_long(pytestconfig: pytest.Config) -> bool:
    """Whether suites run in their full length."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(autouse=True)
def _interrupts_as_they_were() -> Iterator[None]:
    """The command line answers Ctrl-C in its own way, also where a test runs it in this process."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's .gguf file, fetched into the store where it is not there yet."""
    return Store().ensure("smollm2")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models, whose threads would wait for each other longer than they compute."""
    before = native.num_threads()
    native.set_num_threads(1)
    yield
    native.set_num_threads(before)
