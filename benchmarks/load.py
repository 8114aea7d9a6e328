"""Requests that come by and by, the same for every server, and what became of them."""

import json
import random
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import RunError

from thinslice.text.tokenizer import Tokenizer

NUM_REQUESTS = 64
# Each one token to SmolLM2 behind another, so that a text has as many tokens as words.
WORDS = ("time", "people", "water", "house", "river", "music", "light", "paper", "stone", "garden")
PROMPT_TOKENS, NEW_TOKENS = (32, 512), (16, 256)
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 60.0, 600.0


@dataclass(frozen=True)
class Request:
    """One request: when it comes, seconds from the start, and what it asks for."""

    at_s: float
    text: str
    token_ids: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Served:
    """What became of a request; seconds from the start, ``wait_s`` to the first token."""

    sent_s: float
    wait_s: float
    done_s: float
    num_tokens: int


def arrivals(rate: float, tokenizer: Tokenizer) -> list[Request]:
    """A Poisson process of so many requests a second, always the same one; random words."""
    draw, now, requests = random.Random(0), 0.0, []
    for _ in range(NUM_REQUESTS):
        now += draw.expovariate(rate)
        text = " ".join(draw.choices(WORDS, k=draw.randint(*PROMPT_TOKENS)))
        token_ids = tokenizer.encode(text, add_special_tokens=True)[: PROMPT_TOKENS[1]]
        requests.append(Request(now, text, token_ids, draw.randint(*NEW_TOKENS)))
    return requests


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """For another process."""
    path.write_text(json.dumps([asdict(one) for one in requests]), encoding="utf-8")


def read_requests(path: Path) -> list[Request]:
    """What ``write_requests`` wrote."""
    return [Request(**one) for one in json.loads(path.read_text(encoding="utf-8"))]


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Tokens a second from the first request to the last answer, and waits for first tokens."""
    waits = sorted(one.wait_s for one in served)
    seconds = max(one.done_s for one in served) - min(one.sent_s for one in served)
    return {
        "tokens_per_s": sum(one.num_tokens for one in served) / seconds,
        "requests_per_s": len(served) / seconds,
        "median_wait_s": statistics.median(waits),
        "p99_wait_s": statistics.quantiles(waits, n=100, method="inclusive")[-1],
        "num_tokens": sum(one.num_tokens for one in served),
    }


def serve_with_llama(command: Sequence[str | Path], requests: Sequence[Request]) -> dict[str, Any]:
    """The requests to a llama-server that is started for them, each in a thread of its own.

    Errors: RunError.
    """
    with server(command) as address, ThreadPoolExecutor(len(requests)) as pool:
        _ask(address, requests[0].token_ids, 4)
        start = time.perf_counter()
        return summary([*pool.map(lambda one: _serve(address, start, one), requests)])


@contextmanager
def server(command: Sequence[str | Path]) -> Iterator[str]:
    """The address of a server that is started, once it answers; it is ended behind.

    Args:
        command: without host and port.

    Errors: RunError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, started)
            yield address
        finally:
            started.terminate()


def _wait_for(address: str, started: subprocess.Popen[bytes]) -> None:
    until = time.perf_counter() + START_TIMEOUT_S
    while time.perf_counter() < until:
        if started.poll() is not None:
            raise RunError(f"the server ended with exit code {started.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise RunError(f"the server does not answer within {START_TIMEOUT_S:.0f} s")


def _serve(address: str, start: float, request: Request) -> Served:
    time.sleep(max(start + request.at_s - time.perf_counter(), 0.0))
    sent = time.perf_counter()
    first, count = _ask(address, request.token_ids, request.num_tokens)
    return Served(sent - start, first - sent, time.perf_counter() - start, count)


def _ask(address: str, prompt: list[int], num_tokens: int) -> tuple[float, int]:
    """When the first token came, and how many there were."""
    body = {
        "prompt": prompt,
        "n_predict": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{address}/completion", data, headers)
    first, count = 0.0, 0
    try:
        with urllib.request.urlopen(asked, timeout=ANSWER_TIMEOUT_S) as answer:
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                count = event.get("tokens_predicted", 0)
                first = first or time.perf_counter()
    except (OSError, ValueError) as error:
        raise RunError(f"llama-server: {error}") from None
    if count != num_tokens:
        raise RunError(f"llama-server gave {count} of {num_tokens} tokens")
    return first, count
