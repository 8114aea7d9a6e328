"""A store of the tests' own, so that nothing they pack or fetch stays in the user's."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from thinslice.errors import ThinsliceError
from thinslice.store.store import Store


def pytest_configure(config: pytest.Config) -> None:
    """Once for all processes: the embedded model and the machine's speeds are the user's."""
    if hasattr(config, "workerinput"):
        return
    users, home = Store(), Path(tempfile.mkdtemp(prefix="thinslice-tests-"))
    own = home / "models"
    own.mkdir()
    with suppress(ThinsliceError):  # a test that needs the model tells why it is not there
        folder = users.ensure("smollm2").parent
        shutil.copytree(folder, own / folder.name)
        # Named by the disk, which is another one here; a few tokens a second are no matter.
        speeds = users.root / f"hardware-{users.root.stat().st_dev}.json"
        if speeds.exists():
            shutil.copy(speeds, own / f"hardware-{own.stat().st_dev}.json")
    os.environ["THINSLICE_HOME"] = str(home)
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
