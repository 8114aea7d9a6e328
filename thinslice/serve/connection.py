"""One connection to a server: no more than it takes of memory, and no longer than it is used."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from thinslice.serve.errors import RETRY_AFTER_S, ApiError
from thinslice.units import KIB

# Of what was read and is not understood yet, and of what waits for a slow client.
BUFFER_BYTES = 16 * KIB
# The most that a connection holds: what its protocol, task, request and response are made of (22
# KiB, measured with 240 streams), the head of its request, a piece read and a piece to be sent.
CONNECTION_BYTES = 24 * KIB + 3 * BUFFER_BYTES
# Seconds for the head of a request to come.
_HEAD_S = 30.0


def _refusal() -> bytes:
    error = ApiError(503, "too many connections: try again later", code="too_many_connections")
    body = json.dumps(error.body("")).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: {RETRY_AFTER_S}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


class Connection(H11Protocol):
    """uvicorn's, with bounds: connections beyond ``limit_concurrency - 1`` are told so and closed,
    and so are those whose client begins no request, or does not end its head."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        # Of one read; the rest stays with the system.
        vars(transport)["max_size"] = BUFFER_BYTES
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            transport.write(_refusal())
            transport.close()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
        elif self._waiting is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        self._waiting = self.loop.call_later(_HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self._is_answering():
            self.transport.close()


def connections_for(most_requests: int) -> int:
    """How many connections are taken for so many requests at a time: some more, as clients keep
    those that they may need again, and pages and metrics are asked for beside."""
    return most_requests + 32


def bounded(num_connections: int) -> dict[str, Any]:
    """The settings of uvicorn's that hold these bounds."""
    return {
        "http": Connection,
        "limit_concurrency": num_connections + 1,
        "h11_max_incomplete_event_size": BUFFER_BYTES,
    }
