"""Connections: too many, silent ones and long heads end, and leave the server as it was."""

import json
import socket
from contextlib import ExitStack
from dataclasses import replace

import httpx2
import pytest

from tests.asking import server_fixture
from tests.servers import Running
from thinslice.config import EngineSettings
from thinslice.serve import connection
from thinslice.serve.connection import BUFFER_BYTES, CONNECTION_BYTES, connections_for
from thinslice.serve.intake import BodyBounds
from thinslice.serve.room import with_room
from thinslice.serve.settings import ServerSettings
from thinslice.units import MIB

SETTINGS = ServerSettings(drain_s=0.0, max_waiting=1)
# Four sequences run at once.
MOST = connections_for(1 + 4)


server = server_fixture(SETTINGS)


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def until_closed(client: socket.socket) -> bytes:
    came = b""
    while piece := client.recv(65536):
        came += piece
    return came


def test_connections_are_bounded(server: Running) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(connect(server))
        refused = stack.enter_context(connect(server))
        head, _, body = until_closed(refused).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head
        assert json.loads(body)["error"]["code"] == "too_many_connections"
    for _ in range(2000):
        try:
            if httpx2.get(f"{server.url}/health").status_code == 200:
                return
        except httpx2.HTTPError:
            continue
    raise AssertionError("the server takes no connections any more")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(
    sent: bytes, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_HEAD_S", 0.02)
    with connect(server) as client:
        client.sendall(sent)
        assert until_closed(client) == b""


def test_the_second_head_must_come_too(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_S", 0.2)
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    with connect(server) as client:
        client.sendall(head + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(head)
        assert b"HTTP/1.1" not in until_closed(client)


def test_a_long_head_is_refused(server: Running) -> None:
    with connect(server) as client:
        # One byte too many, so that none is left unread: a reset would take the answer with it.
        client.sendall(b"GET /health HTTP/1.1\r\nx: ".ljust(BUFFER_BYTES + 1, b"a"))
        assert until_closed(client).startswith(b"HTTP/1.1 400 ")


def test_what_a_server_holds_is_asked_of_the_plan() -> None:
    settings = EngineSettings(max_num_seqs=4, reserve="1MiB", reserve_per_token=5)
    asked = with_room(settings, SETTINGS)
    for context in (0, 512, 1 << 20):
        room = asked.reserve_bytes + asked.reserve_per_token * context
        bodies = BodyBounds.of(context).room_bytes
        assert room == 12 * MIB + 5 * context + MOST * CONNECTION_BYTES + bodies
    same = replace(asked, reserve=0, reserve_per_token=0)
    assert same == EngineSettings(max_num_seqs=4, forms="reserved")


def test_room_for_forms_is_asked_of_the_plan_unless_they_are_off() -> None:
    for asked, got in (("auto", "reserved"), ("reserved", "reserved"), ("off", "off")):
        settings = EngineSettings(forms=asked)  # type: ignore[arg-type]
        assert with_room(settings, SETTINGS).forms == got
