"""The log: a line for each request, nothing of what is said in it, and nobody who waits for it."""

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.asking import post, slow_steps
from tests.servers import NAME, Running, running
from tests.unit.serve.test_leaving import LONG
from thinslice.engine.async_engine import AsyncEngine
from thinslice.errors import ConfigError
from thinslice.serve import log as module
from thinslice.serve.keys import Key, Keys
from thinslice.serve.log import Log, open_log
from thinslice.serve.settings import ServerSettings

SECRET = "sk-a-secret-of-the-tests"
KEYS = Keys((Key("alice", hashlib.sha256(SECRET.encode()).digest()),))
HEADERS = {"x-api-key": SECRET}
SHORT: Any = {"model": NAME, "prompt": "nobody-reads-this", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.json"


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = ServerSettings(drain_s=0.0, log_format="json", log_file=path, max_waiting=8)
    with running(tmp_path_factory.mktemp("server"), settings, KEYS) as found:
        yield found


def lines(path: Path, request_id: str) -> Any:
    """The line of a request, which comes just behind the answer."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        for one in found:
            if one.get("id") == request_id:
                return one
        time.sleep(0.005)
    raise AssertionError(f"no line of {request_id}")


def complete(server: Running, path: str = "/v1/completions", **body: Any) -> httpx2.Response:
    return post(server, path, {**SHORT, **body}, HEADERS)


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ],
)
def test_a_request_is_a_line(server: Running, path: Path, where: str, more: Any) -> None:
    answer = complete(server, where, **more)
    line = lines(path, answer.headers["x-request-id"])
    assert (line["method"], line["path"], line["status"], line["key"]) == (
        "POST",
        where,
        200,
        "alice",
    )
    assert line["completion_tokens"] == 6
    assert line["prompt_tokens"] > 0
    assert 0 <= line["queue_s"] <= line["first_token_s"] <= line["total_s"] < 60
    assert "is_cut" not in line
    assert re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_an_echo_counts_its_prompt_once(server: Running, path: Path) -> None:
    answer = complete(server, echo=True, logprobs=1, prompt=["abc", "de"], n=2)
    line = lines(path, answer.headers["x-request-id"])
    usage = answer.json()["usage"]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]


def test_what_is_said_is_not_logged(server: Running, path: Path) -> None:
    text = complete(server).json()["choices"][0]["text"]
    refused = complete(server, temperature=9)
    lines(path, refused.headers["x-request-id"])
    logged = path.read_text()
    assert "nobody-reads-this" not in logged
    assert json.dumps(text)[1:-1] not in logged
    assert SECRET not in logged


@pytest.mark.parametrize("given", ["abc", "a.b_c:d-1", "A" * 128])
def test_an_id_that_a_request_brings_is_kept(server: Running, path: Path, given: str) -> None:
    headers = {**HEADERS, "x-request-id": given}
    answer = httpx2.get(f"{server.url}/v1/models", headers=headers)
    assert answer.headers["x-request-id"] == given
    line = lines(path, given)
    assert "prompt_tokens" not in line
    assert "queue_s" not in line


@pytest.mark.parametrize("given", ["", "a b", "A" * 129, "a\tb", "-a", "<x>", "ä"])
def test_an_id_that_is_none_is_replaced(server: Running, given: str) -> None:
    headers = {**HEADERS, "x-request-id": given.encode()}
    answer = httpx2.get(f"{server.url}/v1/models", headers=headers)
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_every_answer_has_its_id(
    server: Running, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    answers = [
        httpx2.get(f"{server.url}/health"),
        httpx2.get(f"{server.url}/nothing"),
        httpx2.get(f"{server.url}/nothing", headers=HEADERS),
        httpx2.get(f"{server.url}/v1/models", headers={**HEADERS, "host": "evil.com"}),
        complete(server, model="other"),
        complete(server, "/v1/messages"),
    ]
    monkeypatch.setattr(AsyncEngine, "submit", wrong)
    answers.append(complete(server))
    assert [one.status_code for one in answers] == [200, 401, 404, 403, 404, 400, 500]
    for one in answers:
        assert lines(path, one.headers["x-request-id"])["status"] == one.status_code
    assert answers[5].headers["request-id"] == answers[5].headers["x-request-id"]
    # What the code itself has to say stands in the same file.
    logging.getLogger("thinslice.serve").warning("by the way")
    for text in ("ValueError: a bug", "by the way"):
        until = time.monotonic() + 20
        while text not in path.read_text():
            assert time.monotonic() < until


def test_an_answer_that_is_cut_says_so(
    server: Running, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = slow_steps(monkeypatch)
    num_before = path.read_text().count('"is_cut": true')
    with running_request(server):
        while len(began) < 5:
            time.sleep(0.002)
    server.wait_until_idle()
    until = time.monotonic() + 20
    while path.read_text().count('"is_cut": true') == num_before:
        assert time.monotonic() < until


def running_request(server: Running) -> Any:
    content = json.dumps({**LONG, "stream": True}).encode()
    found = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {SECRET}\r\n"
    found.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return found


def test_a_line_for_a_person(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with running(tmp_path, ServerSettings(drain_s=0.0, log_file=path), KEYS) as server:
        httpx2.get(f"{server.url}/a%0Ab%20c", headers={**HEADERS, "x-request-id": "one"})
        complete(server)
    first, second = path.read_text().splitlines()
    assert re.fullmatch(r"\S+ 404 GET '/a\\nb c' id=one total_s=0\.\d{3} key=alice", first), first
    assert " 200 POST /v1/completions id=" in second
    assert " completion_tokens=6 " in second


def test_content_is_logged_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "log"
    settings = ServerSettings(drain_s=0.0, log_file=path, log_format="json", log_content=True)
    with running(tmp_path, settings, KEYS) as server:
        text = complete(server).json()["choices"][0]["text"]
        complete(server, prompt="ab " * 10_000)
    first, second = map(json.loads, path.read_text().splitlines())
    assert json.loads(first["request"])["prompt"] == SHORT["prompt"]
    assert json.loads(first["response"])["choices"][0]["text"] == text
    assert len(second["request"]) == 16 * 1024


def test_a_full_disk_harms_no_answer_and_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ServerSettings(drain_s=0.0, log_file=Path("/dev/full"))
    with running(tmp_path, settings, KEYS) as server:
        for _ in range(3):
            assert complete(server).status_code == 200
    told = capfd.readouterr().err
    assert told.count("the log cannot be written: No space left on device") == 1


def test_who_does_not_read_the_log_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LAST_S", 0.05)
    reading, writing = os.pipe()
    log = Log(writing, "text")
    log.start()
    for _ in range(200):
        log.write({}, "x" * 50_000)  # ten megabytes in all
    assert log._num_bytes <= 1 << 20
    log.close()
    with open(reading, "rb") as file:
        while log._thread.is_alive():
            os.set_blocking(reading, False)
            file.read(1 << 16)
    os.close(writing)
    assert capfd.readouterr().err.count("lines of the log came too fast") == 1


def test_lines_go_on_once_a_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    with open_log(ServerSettings(log_file=path)) as log:
        write, is_full = os.write, [True]

        def partly(descriptor: int, content: bytes) -> int:
            if descriptor == log._descriptor and is_full:
                if len(is_full) > 1:
                    raise OSError(28, "No space left on device")
                is_full.append(True)
                return write(descriptor, content[:5])
            return write(descriptor, content)

        monkeypatch.setattr(os, "write", partly)
        log.start()
        log.write({}, "first")
        while len(is_full) < 2 or log._num_bytes or not log._is_told:
            time.sleep(0.001)
        is_full.clear()
        log.write({}, "second")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(" second")


def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--log-file .* cannot be opened: Is a directory"):
        open_log(ServerSettings(log_file=tmp_path))


def test_a_file_is_appended_to_and_private(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        with open_log(ServerSettings(log_file=path)) as log:
            log.start()
            log.write({}, "a\nb\rc")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [line.split(" ", 1)[1] for line in path.read_text().splitlines()] == [
        "a",
        "   b\\rc",
    ] * 2
