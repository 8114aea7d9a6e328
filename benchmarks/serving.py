"""The server beside the engine alone and beside llama-server: `python benchmarks/serving.py`.

Sixteen clients with streams of SmolLM2, each with its next request as soon as the last one is
answered: what HTTP takes of the engine's tokens a second, and those of llama-server. Then the wait
for a first token where as many requests come as llama-server was seen to serve. Each in turn, in
rounds; both servers are asked by the same client, by /v1/completions. llama-server is built at the
first run, as for benchmarks/peers.py. A table goes to standard error; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import OURS, ROOT, Case, Figure, Run, RunError, report, run_case, run_json, use_cores
from load import ANSWER_TIMEOUT_S, Request, Served, arrivals, server, summary, write_requests
from peer_environment import DEFAULT_FOLDER, PeerEnvironment

from thinslice.checkpoint.open import open_checkpoint
from thinslice.store.store import Store
from thinslice.text.tokenizer import load_tokenizer

ENGINE, LLAMA = "engine alone", "llama-server"
NUM_CLIENTS, CONTEXT, MEMORY = 16, 768, "2GiB"
# More than any of them serves.
FLOOD = 1000.0


@dataclass(frozen=True)
class Contestant:
    """A server, by the command that starts it but for its port."""

    name: str
    command: Sequence[str | Path]

    def answers(self, requests: Sequence[Request], num_clients: int) -> dict[str, Any]:
        """Start it, have so many clients ask at a time, and end it. Errors: RunError."""
        with server(self.command) as address, ThreadPoolExecutor(num_clients) as pool:
            self._ask(address, replace(requests[0], num_tokens=4))
            start = time.perf_counter()
            return summary([*pool.map(lambda one: self._served(address, start, one), requests)])

    def _served(self, address: str, start: float, request: Request) -> Served:
        time.sleep(max(start + request.at_s - time.perf_counter(), 0.0))
        sent = time.perf_counter()
        first, count = self._ask(address, request)
        return Served(sent - start, first - sent, time.perf_counter() - start, count)

    def _ask(self, address: str, request: Request) -> tuple[float, int]:
        """When the first token came, and how many there were."""
        body = {
            "model": "smollm2",
            "prompt": request.text,
            "max_tokens": request.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        asked = urllib.request.Request(f"{address}/v1/completions", data, headers)
        first, last = 0.0, b""
        try:
            with urllib.request.urlopen(asked, timeout=ANSWER_TIMEOUT_S) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        first, last = first or time.perf_counter(), line
            count = json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.name}: {error!r}") from None
        if count != request.num_tokens:
            raise RunError(f"{self.name} gave {count} of {request.num_tokens} tokens")
        return first, count


def engine_alone(requests: Sequence[Request], folder: Path) -> dict[str, Any]:
    """The same by AsyncEngine in a process of its own. Errors: RunError."""
    file = folder / "requests.json"
    write_requests(file, requests)
    script = ROOT / "benchmarks" / "run_engine.py"
    command = [sys.executable, script, "load", "smollm2", "--prompts", file, "--memory", MEMORY]
    return run_json(command, environment={"OMP_WAIT_POLICY": "PASSIVE"})


def cases(folder: Path, peers: PeerEnvironment, threads: int) -> list[Case]:
    """Tokens a second, then waits."""
    path = Store().ensure("smollm2")
    tokenizer = load_tokenizer(open_checkpoint(path))
    flood = [replace(one, at_s=0.0) for one in arrivals(FLOOD, tokenizer)]
    ours = [sys.executable, "-m", "thinslice", "serve", "smollm2", "--memory", MEMORY]
    ours += ["--sequences", str(NUM_CLIENTS), "--context", str(CONTEXT)]
    theirs = [peers.llama("llama-server"), "-m", path, "-np", str(NUM_CLIENTS), "-ngl", "0"]
    theirs += ["-c", str(NUM_CLIENTS * CONTEXT), "-t", str(threads)]
    contestants = {OURS: Contestant(OURS, ours), LLAMA: Contestant(LLAMA, theirs)}
    saturated: list[float] = []

    def flooded(name: str) -> dict[str, Any]:
        result = contestants[name].answers(flood, NUM_CLIENTS)
        if name == LLAMA:
            saturated.append(result["requests_per_s"])
        return result

    def waited(name: str) -> dict[str, Any]:
        if not saturated:
            raise RunError(f"the rate that saturates {LLAMA} was not measured")
        requests = arrivals(statistics.median(saturated), tokenizer)
        return contestants[name].answers(requests, len(requests))

    rates = {name: figure("tokens_per_s", flooded, name) for name in (OURS, LLAMA)}
    rates[ENGINE] = figure("tokens_per_s", lambda _: engine_alone(flood, folder), ENGINE)
    waits = {name: figure("median_wait_s", waited, name) for name in (OURS, LLAMA)}
    work = "64 requests; prompts 32-512, outputs 16-256; random words"
    note = f"{NUM_CLIENTS} clients, {work}"
    return [
        Case("http-tokens", "tokens/s", rates, {LLAMA: 3.0, ENGINE: 0.9}, note),
        Case("http-first-token", "s", waits, {LLAMA: 2.0}, "as many as llama-server serves"),
    ]


def figure(field: str, measure: Callable[[str], dict[str, Any]], name: str) -> Run:
    """One of the values that a measurement gives."""

    def run() -> Figure:
        result = measure(name)
        return Figure(result[field], result)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    try:
        use_cores(options.threads)
        peers = PeerEnvironment(options.peers)
        peers.set_up_llama()
        with tempfile.TemporaryDirectory() as folder:
            rows = [
                row
                for case in cases(Path(folder), peers, options.threads)
                for row in run_case(case, options.rounds)
            ]
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report("serving", rows, {"rounds": options.rounds})


if __name__ == "__main__":
    sys.exit(main())
