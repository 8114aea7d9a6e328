"""What forks the commands of warm_start: ``python -m tests.warm_server SOCKET``.

It ends with its standard input.
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass

import thinslice.cli.commands
import thinslice.engine.compare
import thinslice.engine.llm
import thinslice.pack.pack  # noqa: F401
from tests.warm_start import STREAMS
from thinslice.cli.app import main


@dataclass
class _Child:
    """A command that runs, and who waits for it."""

    pid: int
    pid_fd: int
    connection: socket.socket

    def end(self) -> None:
        """Tell how it ended."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pid_fd)
        with self.connection, suppress(OSError):  # nobody waits any more
            self.connection.send(str(os.waitstatus_to_exitcode(status)).encode())

    def kill(self) -> None:
        """End it for somebody who has gone away."""
        os.kill(self.pid, signal.SIGKILL)


def serve(path: str) -> list[str]:
    """Fork a child for each order until standard input ends; in a child, its arguments."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    children: list[_Child] = []
    while True:
        watched = [0, listener, *(c.pid_fd for c in children), *(c.connection for c in children)]
        ready = select.select(watched, [], [])[0]
        for child in list(children):
            if child.pid_fd in ready:
                child.end()
                children.remove(child)
            elif child.connection in ready:
                child.kill()
        if listener in ready:
            connection, _ = listener.accept()
            _, descriptors, _, _ = socket.recv_fds(connection, 16, len(STREAMS) + 1)
            pid = os.fork()
            if pid == 0:
                for one in (listener, connection, *(c.connection for c in children)):
                    one.close()
                return _become(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            children.append(_Child(pid, os.pidfd_open(pid), connection))
        if 0 in ready:
            for child in children:
                child.kill()
            os._exit(0)


def _become(descriptors: list[int]) -> list[str]:
    """Take over the streams, the variables and the folder of whoever asked."""
    *streams, file = descriptors
    with open(file, "rb") as content:
        order = json.load(content)
    for stream, given in zip(STREAMS, streams, strict=True):
        os.dup2(given, stream)
        os.close(given)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0),  # noqa: SIM115
        open(1, "w"),  # noqa: SIM115
        open(2, "w", buffering=1, errors="backslashreplace"),  # noqa: SIM115
    )
    environment: dict[str, str] = order["environment"]
    arguments: list[str] = order["arguments"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(order["folder"])
    sys.argv = ["thinslice", *arguments]
    return arguments


if __name__ == "__main__":
    main(serve(sys.argv[1]))
