"""Whether there is a browser for the tests of the page; where there is none, one line says so."""

import os
import shutil
from pathlib import Path

import pytest

# Set where a run without a browser is no success.
REQUIRED = "THINSLICE_BROWSER_REQUIRED"
_FOLDER = Path(__file__).parent / "browser"


def chromium() -> str | None:
    """The browser's program: Debian calls it chromium, others as Google does."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def _is_left_out() -> bool:
    return chromium() is None and not os.environ.get(REQUIRED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the browser's tests out where there is none and none is required."""
    if _is_left_out():
        left_out = [item for item in items if _FOLDER in item.path.parents]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was not tested, and what it takes."""
    given = [Path(str(argument).partition("::")[0]).resolve() for argument in config.args]
    is_asked_for = any(
        one in (_FOLDER, *_FOLDER.parents) or _FOLDER in one.parents for one in given
    )
    if is_asked_for and _is_left_out():
        terminalreporter.write_line(
            "left out: tests/browser, that is, the chat page in a browser; apt-get install chromium"
        )
