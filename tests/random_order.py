"""Tests run in an order drawn anew each time: one that needs another before it is found.

    pytest --order-seed 7       the order of seed 7 again, which the end of a run prints
    pytest --order-seed file    the order of the files

Modules are shuffled, and the tests within each, so that a module's own fixtures are made once. With
two processes a seed gives the order of the modules, and chance which of the two runs each.
"""

import random
import time
from itertools import groupby
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order-seed", default=None, help="a number, or file for the files' order")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--order-seed")
    if given not in (None, "file") and not str(given).isdigit():
        raise pytest.UsageError(f"--order-seed {given}: expected a number or file")
    seed = str(time.time_ns() % 1_000_000) if given is None else str(given)
    # With several processes each has to order the tests alike.
    config.stash[_SEED] = getattr(config, "workerinput", {_NAME: seed})[_NAME]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of xdist the seed."""
    node.workerinput[_NAME] = node.config.stash[_SEED]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.write_line(f"order of the tests: --order-seed {config.stash[_SEED]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.stash[_SEED]
    if seed == "file":
        return
    rng = random.Random(int(seed))
    modules = [list(tests) for _, tests in groupby(items, lambda item: item.path)]
    rng.shuffle(modules)
    for tests in modules:
        rng.shuffle(tests)
    items[:] = [test for tests in modules for test in tests]


_SEED, _NAME = pytest.StashKey[str](), "order_seed"
