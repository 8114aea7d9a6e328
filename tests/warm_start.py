"""Commands in processes that have imported the command line already.

    subprocess.run([*warm_thinslice(), "plan", "smollm2"], ...)

behaves as with ``python -m thinslice``, half a second sooner: one process imports what commands
need and forks a child for each. What happens before and while that is imported (variables that
libraries read, encodings, control groups, Ctrl-C at a start) needs processes of its own, and so
does what is said of memory: such a child begins without most pages of the libraries.
"""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

STREAMS = (0, 1, 2)


@functools.cache
def warm_thinslice() -> list[str]:
    """What a command line begins with."""
    if not hasattr(os, "pidfd_open"):  # Linux alone has it
        return [sys.executable, "-m", "thinslice"]
    folder = tempfile.TemporaryDirectory(prefix="thinslice-warm-")
    path = str(Path(folder.name) / "socket")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm_server", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.communicate()  # closes its standard input, which ends it
        folder.cleanup()

    atexit.register(end)
    return [sys.executable, "-S", __file__, path]


def ask(path: str, arguments: list[str]) -> None:
    """Have a command run with the streams, the variables and the folder of this process, and end
    as it does."""
    order = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        with tempfile.TemporaryFile() as file:  # an environment may be longer than a message
            file.write(json.dumps(order).encode())
            file.seek(0)
            socket.send_fds(connection, [b"run"], [*STREAMS, file.fileno()])
        told = connection.recv(16)
    if not told:
        sys.exit("the process that forks commands has ended")
    code = int(told)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2:])
