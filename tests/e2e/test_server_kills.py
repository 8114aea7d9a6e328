"""Clients and servers that are killed in the middle, and a disk that is full."""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_commands import thinslice
from tests.load_clients import choices_of, events_of, post
from tests.served_process import ServedProcess, served_process
from tests.tiny_llm import write_model

PATH = "/v1/completions"
# Sends what it is given, tells that an answer has begun, and reads on.
CLIENT = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as found:
    found.sendall(sys.stdin.buffer.read())
    while b"data: " not in found.recv(4096):
        pass
    print("begun", flush=True)
    while found.recv(4096):
        pass
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@contextmanager
def served(model: str, log: Path, *more: str, port: int = 0) -> Iterator[ServedProcess]:
    options = ["--memory", "400MiB", "--draft", "off", *more]
    with served_process(model, *options, log=log, port=port) as found:
        yield found


def body(model: str, **more: Any) -> bytes:
    asked = {"model": model, "prompt": "a", "seed": 3, "max_tokens": 400, "ignore_eos": True}
    return json.dumps({**asked, "stream": True, **more}).encode()


def answer(server: ServedProcess, content: bytes) -> Any:
    status, found = asyncio.run(asyncio.wait_for(post(server.port, PATH, content), 60))
    assert status == 200, found
    return choices_of(events_of(found))


def begun(server: ServedProcess, content: bytes) -> "subprocess.Popen[bytes]":
    """A client in a process of its own, whose answer has begun."""
    called = [sys.executable, "-c", CLIENT, str(server.port)]
    found = subprocess.Popen(called, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert found.stdin is not None
    assert found.stdout is not None
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    with found.stdin as given:
        given.write(head.encode() + content)
    assert found.stdout.readline() == b"begun\n"
    found.stdout.close()
    return found


def test_a_client_that_is_killed_leaves_its_place_to_the_next(
    tmp_path: Path, smollm2_path: Path, is_long: bool
) -> None:
    """Of one place; the first answer alone would have taken far longer than all that is asked."""
    model, num_killed, most = "smollm2", 12 if is_long else 3, 7000
    options = ["--sequences", "1", "--context", "8192"]
    with served(model, tmp_path / "log", *options) as server:
        short = body(model, max_tokens=2)
        expected = answer(server, short)
        for _ in range(num_killed):
            client = begun(server, body(model, max_tokens=most))
            client.send_signal(signal.SIGKILL)
            client.wait()
            assert answer(server, short) == expected
        server.wait_until_idle()
        assert f'reason="abort"}} {num_killed}.0' in server.get("/metrics")
        assert server.metric("completion_tokens_total") < most


def test_a_server_that_is_killed_starts_again_in_its_place(
    home: Path, tmp_path: Path, model: str, is_long: bool
) -> None:
    port, expected = 0, None
    for count in range(8 if is_long else 3):
        with served(model, tmp_path / f"log{count}", port=port) as server:
            found = answer(server, body(model, max_tokens=20))
            assert expected in (None, found)
            port, expected = server.port, found
            (record,) = json.loads(thinslice("ps", "--json", home=home).stdout)["servers"]
            assert (record["pid"], record["port"]) == (server.pid, port)
            assert len([*(home / "servers").iterdir()]) == 1
            client = begun(server, body(model, n=50))
            server.process.kill()
            server.process.wait()
            client.wait(20)
    assert json.loads(thinslice("ps", "--json", home=home).stdout)["servers"] == []
    assert [*(home / "servers").iterdir()] == []


def test_told_to_end_under_load_it_ends_every_answer_that_it_began(
    home: Path, tmp_path: Path, model: str, is_long: bool
) -> None:
    count = 64 if is_long else 16

    async def load(server: ServedProcess) -> list[Any]:
        asked = [post(server.port, PATH, body(model, n=2)) for _ in range(count)]
        clients = [asyncio.create_task(one) for one in asked]
        while await asyncio.to_thread(server.metric, "num_running") == 0:
            pass
        os.kill(server.pid, signal.SIGTERM)
        return await asyncio.gather(*clients, return_exceptions=True)

    with served(model, tmp_path / "log") as server:
        expected = answer(server, body(model, n=2))
        found = asyncio.run(load(server))
        assert server.process.wait(60) == 0
    ended = [
        choices_of(events_of(one[1])) for one in found if isinstance(one, tuple) and one[0] == 200
    ]
    assert ended == [expected] * len(ended)
    assert len(ended) > 0
    # Who came too late was told so, or found nobody.
    late = [one for one in found if not isinstance(one, tuple) or one[0] != 200]
    assert all(isinstance(one, OSError) or one[0] in (429, 503) for one in late), late
    assert [*(home / "servers").iterdir()] == []


def test_a_log_on_a_full_disk_holds_no_answer_up(tmp_path: Path, model: str) -> None:
    """As a bound on the size of files makes it: what cannot be written is told once, and once there
    is room again whole lines are written."""
    told, lines = tmp_path / "told", tmp_path / "lines"
    options = ["--log-format", "json", "--log-file", str(lines)]
    with served(model, told, *options) as server:
        expected = answer(server, body(model, max_tokens=20))
        size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
        for _ in range(12):
            assert answer(server, body(model, max_tokens=20)) == expected
        while "cannot be written" not in told.read_text():
            time.sleep(0.01)
        assert lines.stat().st_size == 700
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        assert answer(server, body(model, max_tokens=20)) == expected
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert told.read_text().count("cannot be written") == 1
    last = json.loads(lines.read_text().splitlines()[-1])
    assert (last["status"], last["path"]) == (200, PATH)
