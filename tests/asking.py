"""What tests of a server ask it with: fixtures of servers and clients, and requests by hand."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.servers import Running, running
from tests.tiny_llm import TEMPLATE
from thinslice.engine.engine import Engine
from thinslice.serve.keys import Keys
from thinslice.serve.settings import ServerSettings


def server_fixture(
    settings: ServerSettings | None = None, keys: Keys | None = None, template: str = TEMPLATE
) -> Any:
    """The fixture ``server``, one for a module."""

    @pytest.fixture(scope="module")
    def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
        with running(tmp_path_factory.mktemp("server"), settings, keys, template) as found:
            yield found

    return server


def openai_of(server: Running) -> openai.OpenAI:
    """OpenAI's client, which holds answers strictly to its types."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def anthropic_of(server: Running) -> anthropic.Anthropic:
    """Anthropic's client, which holds answers strictly to its types."""
    return anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True
    )


def client_fixture(of: Any) -> Any:
    """A fixture of a client that one of these functions makes for the module's ``server``."""

    @pytest.fixture(scope="module")
    def client(server: Running) -> Iterator[Any]:
        with of(server) as found:
            yield found

    return client


def post(
    server: Running, path: str, body: Any, headers: dict[str, str] | None = None
) -> httpx2.Response:
    """The answer to a request, whose body is bytes or is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **(headers or {})}
    return httpx2.post(f"{server.url}{path}", content=content, headers=headers, timeout=60)


def events(server: Running, path: str, body: Any) -> list[Any]:
    """The data of each event of a stream; text where it is no JSON."""
    lines = post(server, path, {**body, "stream": True}).text.split("\n\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def ask(server: Running, body: Any, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent, and nothing was read."""
    content = json.dumps(body).encode()
    found = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    found.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return found


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.01) -> list[float]:
    """Make each step take so long; the times at which steps began."""
    began: list[float] = []
    step = Engine.step

    def slow(self: Engine) -> None:
        began.append(time.monotonic())
        time.sleep(seconds)
        step(self)

    monkeypatch.setattr(Engine, "step", slow)
    return began
