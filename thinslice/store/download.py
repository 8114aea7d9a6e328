"""Download one file over HTTP, going on where an earlier try was broken off.

huggingface_hub's own download starts again from nothing in a new process (2.4 gives each try a
temporary file of its own and deletes it on failure), so the transfer is done here. Session,
headers, retries of a busy server and offline mode are huggingface_hub's.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    hf_raise_for_status,
    http_stream_backoff,
)

from thinslice.errors import StoreError

# Seconds to wait after each try in a row that brought nothing: about half a minute in all.
_WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


def download(
    url: str,
    part: Path,
    num_bytes: int,
    headers: Mapping[str, str],
    report: Callable[[int], None],
) -> None:
    """Append to ``part`` until it has all its bytes; what it has already is not fetched again.

    A redirect to another host is followed without the Authorization header.

    Peak extra memory: what the network hands over at a time.
    Errors: StoreError where the server sends too much or ends too early; what httpx2 and
    huggingface_hub raise, once no try brings a byte any more.
    """
    if num_bytes == 0:
        part.touch()
    waits = iter(_WAITS_S)
    while (have := _size_of(part)) < num_bytes:
        failure: httpx2.TransportError | None = None
        try:
            _receive(url, part, num_bytes, headers, report)
        except httpx2.TransportError as error:
            failure = error
        got = _size_of(part)
        if got > have:
            waits = iter(_WAITS_S)
        if got >= num_bytes:
            return
        wait = next(waits, None)
        if wait is None:
            raise failure or StoreError(f"{url} ended after {got} of {num_bytes} bytes")
        time.sleep(wait)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(
    url: str,
    part: Path,
    num_bytes: int,
    headers: Mapping[str, str],
    report: Callable[[int], None],
) -> None:
    have = _size_of(part)
    wanted = {**headers, "Accept-Encoding": "identity"}
    if have:
        wanted["Range"] = f"bytes={have}-"
    with http_stream_backoff(
        "GET",
        url,
        headers=wanted,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
        retry_on_exceptions=(),
    ) as response:
        hf_raise_for_status(response)
        # A server that does not know ranges answers 200 and starts from the first byte.
        with part.open("ab" if response.status_code == 206 else "wb") as out:
            done = out.tell()
            for block in response.iter_bytes():
                done += len(block)
                if done > num_bytes:
                    raise StoreError(f"{url} sent more than its {num_bytes} bytes")
                out.write(block)
                report(done)
