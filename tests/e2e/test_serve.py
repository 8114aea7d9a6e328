"""thinslice serve as its user starts and ends it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from tests.tiny_llm import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def command(model: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "thinslice", "serve", str(model), "--memory", "400MiB"]
    return [*start, "--draft", "off", *more]


@contextmanager
def served(
    model: Path, *more: str, port: str = "0"
) -> Iterator[tuple["subprocess.Popen[str]", str, list[str]]]:
    """A server, its address, once it has told it, and the lines up to that."""
    with subprocess.Popen(
        command(model, "--port", port, *more), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            lines = [process.stderr.readline()]
            while "serving" not in lines[-1]:
                assert lines[-1], "it ended before it served"
                lines.append(process.stderr.readline())
            found = re.search(r"http://\S+(?=/v1)", lines[-1])
            assert found is not None
            yield process, found[0], lines
        finally:
            process.kill()


def test_a_server_says_at_its_start_what_fits(model: Path) -> None:
    with served(model, "--context", "48", "--sequences", "3") as (_, _, lines):
        said = next(line for line in lines if "at a time" in line)
        assert "in 400.00 MiB: a context of 48 tokens, 144 for all of 3 at a time" in said
        assert "weights in memory" in said


def ready(url: str) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if httpx2.get(f"{url}/ready").status_code == 200:
                return
        except httpx2.ConnectError:
            time.sleep(0.01)
    raise AssertionError("not ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_takes_no_more(model: Path, number: signal.Signals) -> None:
    with served(model) as (process, url, _):
        ready(url)
        body = {"model": str(model), "prompt": "a", "max_tokens": 400, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(process.pid, number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(model: Path) -> None:
    body = {"model": str(model), "prompt": "a", "max_tokens": 500, "n": 100, "stream": True}
    lines: list[str] = []
    with served(model, "--drain-s", "600") as (process, url, _):
        ready(url)
        with (
            suppress(httpx2.RemoteProtocolError),
            httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer,
        ):
            for line in answer.iter_lines():
                if not lines:
                    os.kill(process.pid, signal.SIGINT)
                    time.sleep(0.2)
                    os.kill(process.pid, signal.SIGINT)
                lines.append(line)
        assert process.wait(20) == 0
    assert "data: [DONE]" not in lines


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command(model, "--port", port), capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--port", "70000"), "--port is 70000"),
        (("--max-waiting", "0"), "--max-waiting is 0"),
        (("--drain-s", "-1"), "--drain-s is -1"),
        (("--allow-origin", "*"), "--allow-origin is"),
        (("--allow-host", "http://x.com"), "--allow-host is"),
        (("--keys", "/nonexistent"), "/nonexistent cannot be read"),
        (("--sequences", "0"), "--sequences is 0"),
        (("--host", "256.0.0.1"), "cannot listen on 256.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_one_line(model: Path, more: tuple[str, ...], told: str) -> None:
    done = subprocess.run(command(model, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert told in done.stderr


@pytest.mark.parametrize("key", [None, "a-key-of-the-tests"])
def test_a_server_that_others_reach_without_a_key_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    if key is not None:
        monkeypatch.setenv("THINSLICE_API_KEY", key)
    with served(model, "--host", "0.0.0.0") as (process, _, told):
        process.terminate()
        assert process.wait(20) == 0
    assert ("may use this server" in "".join(told)) == (key is None)


def test_the_page_is_opened_once_it_is_served(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, browser = tmp_path / "shown", tmp_path / "browser"
    get = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
    browser.write_text(
        f'#!/bin/sh\n{sys.executable} -c "{get}" "$1" > {shown}.new\nmv {shown}.new {shown}'
    )
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with served(model, "--open", "--host", "0.0.0.0"):
        until = time.monotonic() + 20
        while not shown.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    assert "<title>thinslice</title>" in shown.read_text()


def test_where_there_is_no_browser_one_line_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with served(model, "--open") as (process, url, _):
        assert process.stderr is not None
        assert process.stderr.readline() == f"no browser opened {url}\n"
        ready(url)
        process.terminate()
        assert process.wait(20) == 0
        assert "browser" not in process.stderr.read()


def test_killed_it_starts_again_at_once(model: Path) -> None:
    with served(model) as (process, url, _):
        port = url.rpartition(":")[2]
        process.kill()
        process.wait()
        with served(model, port=port) as (_, again, _):
            ready(again)


@pytest.mark.parametrize("forms", ["auto", "off"])
def test_the_plan_of_a_server_has_room_for_forms(model: Path, forms: str) -> None:
    with served(model, "--forms", forms) as (_, url, _):
        ready(url)
        parts = httpx2.get(f"{url}/plan").json()["plan"]["parts"]
        assert ("forms" in parts) == (forms == "auto")
        body = {"model": str(model), "messages": [{"role": "user", "content": "a"}]}
        body["response_format"] = {"type": "json_object"}
        answer = httpx2.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 4})
        assert answer.status_code == (200 if forms == "auto" else 400), answer.text
