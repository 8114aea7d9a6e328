"""Pull a model again and again, each time killed (SIGKILL) one step later than the time before.

A step is a report of progress, or whatever the interpreter tells its audit hooks before it changes
the file system or opens a file of the store. The two are counted apart, for of the first there are
more or fewer from one time to the next. After every kill the store is looked at and the
pull is made once more, to its end. Prints one JSON object for each kill. Run by test_crashes.py as
a process of its own, because it forks and has no threads.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from thinslice.store import changes, hub  # noqa: F401  (imported once, before the forks)
from thinslice.store.known_models import EmbeddedModel
from thinslice.store.store import Store

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def main() -> None:
    base, name, model = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    known = {"tiny": EmbeddedModel(**model)} if model else {}
    with patch("thinslice.store.names.EMBEDDED", known):
        for is_report in (False, True):
            step = 0
            while pull_is_killed_at(
                step, is_report, store := Store(base / f"{is_report}-{step}"), name
            ):
                print(json.dumps(look_and_pull_again(store, name)), flush=True)
                step += 1


def pull_is_killed_at(step: int, is_report: bool, store: Store, name: str) -> bool:
    child = os.fork()
    if child == 0:
        steps_left = step

        def count(*args: Any) -> None:
            nonlocal steps_left
            if steps_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            steps_left -= 1

        def hook(event: str, args: tuple[Any, ...]) -> None:
            flags = args[2] if event == "open" else 0
            is_in_store = event == "open" and str(args[0]).startswith(str(store.root))
            if event in _CHANGES or is_in_store or (isinstance(flags, int) and flags & _WRITES):
                count()

        if is_report:
            store.pull(name, count)
        else:
            sys.addaudithook(hook)
            store.pull(name)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


def look_and_pull_again(store: Store, name: str) -> dict[str, Any]:
    is_listed = [model.name for model in store.list()]
    left = sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*"))
    model = store.pull(name)
    folder = next(path for path in store.root.iterdir() if path.name != ".locks")
    return {
        "left": left,
        "listed": is_listed,
        "hashes": [file.sha256 for file in model.files],
        "files": sorted(path.name for path in folder.iterdir()),
        "unfinished": len(store.unfinished()),
    }


main()
