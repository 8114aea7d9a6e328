"""Clients that go away, read slowly or are too many, and an engine that fails under an answer."""

import json
import socket
import time
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest

from tests.asking import ask, post, server_fixture, slow_steps
from tests.servers import NAME, Running, running
from thinslice.engine.engine import Engine
from thinslice.errors import CheckpointError
from thinslice.serve import events
from thinslice.serve.settings import ServerSettings

LONG: Any = {"model": NAME, "prompt": "the moon", "max_tokens": 480, "temperature": 0}


server = server_fixture(ServerSettings(drain_s=0.0, max_waiting=4))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_who_goes_away_frees_the_place_within_a_step(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    blocks = server.served.engine.llm.engine.scheduler.blocks
    num_free = blocks.num_free
    began = slow_steps(monkeypatch)
    with ask(server, {**LONG, "stream": is_streamed}):
        while len(began) < 5:
            time.sleep(0.002)
    left = time.monotonic()
    server.wait_until_idle()
    # The step that was under way, and the one that its end is seen in.
    assert sum(at > left for at in began) <= 3
    assert blocks.num_free == num_free


def test_a_slow_reader_holds_nobody_else_back(server: Running) -> None:
    with ask(server, {**LONG, "stream": True}):
        answer = post(server, "/v1/completions", LONG)
        assert answer.json()["usage"]["completion_tokens"] == 480
    server.wait_until_idle()


def test_more_than_may_wait_are_refused_and_told_when_to_come_again(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch)
    scheduler = server.served.engine.llm.engine.scheduler
    asking: list[socket.socket] = []
    try:
        for queue in (scheduler.running, scheduler.waiting):
            asking.append(ask(server, {**LONG, "n": 4}))
            until = time.monotonic() + 30
            while len(queue) < 4:
                assert time.monotonic() < until
        answer = post(server, "/v1/completions", LONG)
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) > 0
    finally:
        for one in asking:
            one.close()
    server.wait_until_idle()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_error_under_way_is_told_and_the_next_request_is_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    step = Engine.step

    def failing(self: Engine) -> None:
        if any(len(one.completion_token_ids) > 3 for one in self.scheduler.running):
            raise CheckpointError("the disk is gone")
        step(self)

    monkeypatch.setattr(Engine, "step", failing)
    asked = {**LONG, "stream": is_streamed}
    answer = post(server, "/v1/completions", asked)
    if is_streamed:
        assert answer.status_code == 200
        *_, last, end = answer.text.split("\n\n")
        assert end == ""
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 500
        error = answer.json()["error"]
    assert (error["message"], error["type"]) == ("the disk is gone", "server_error")
    monkeypatch.undo()
    short = {**LONG, "max_tokens": 2}
    assert post(server, "/v1/completions", short).status_code == 200


def test_a_comment_comes_where_no_event_does_for_long(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.02)
    slow_steps(monkeypatch, 0.1)
    asked = {**LONG, "max_tokens": 3, "stream": True}
    text = post(server, "/v1/completions", asked).text
    assert text.count(": waiting\n\n") >= 3
    assert text.endswith("data: [DONE]\n\n")


def test_what_is_under_way_ends_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch)
    answers: list[httpx2.Response] = []
    with running(tmp_path) as server:
        url = f"{server.url}/v1/completions"
        asking = Thread(target=lambda: answers.append(httpx2.post(url, json=LONG, timeout=60)))
        asking.start()
        while not server.num_running():
            time.sleep(0.001)
    asking.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "shutting_down"
