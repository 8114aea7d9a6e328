"""Hostile bodies on every path that takes one: typed errors, and a server that goes on."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from tests.hostile_bodies import Good, mutated
from tests.load_clients import post, refusal_of
from tests.served_process import ServedProcess, served_process
from tests.tiny_llm import write_model
from thinslice.serve.intake import BodyBounds
from thinslice.units import MIB

REFUSALS = {400, 404, 413, 429}
PATIENCE_S = 10.0
CONTEXT = 192
LARGEST = BodyBounds.of(CONTEXT).num_bytes


def good_bodies(document: dict[str, Any]) -> list[Good]:
    """The examples of the server's own document."""
    schemas, found = document["components"]["schemas"], []
    for path, methods in document["paths"].items():
        if "requestBody" in (operation := methods.get("post", {})):
            content = operation["requestBody"]["content"]["application/json"]
            fields = schemas[content["schema"]["$ref"].rpartition("/")[2]]["properties"]
            found.append(Good(path, content["examples"]["short"]["value"], [*fields]))
    page = {"text": "# A\n\n```python\nx = 1\n```", "is_whole": True}
    return [*found, Good("/page/render", page, [*page])]


async def judged(port: int, path: str, body: bytes) -> tuple[str, str | None]:
    """How a body was answered, and what is wrong with that."""
    try:
        status, content = await asyncio.wait_for(post(port, path, body), PATIENCE_S)
    except TimeoutError:
        return "left", f"no answer in {PATIENCE_S} s"
    if status == 0 and len(body) > LARGEST:
        return "cut", None
    if status not in REFUSALS:
        is_bug = status != 200 or b"server_error" in content or b"bug of its own" in content
        return str(status), content[:300].decode() if is_bug else None
    return str(status), None if refusal_of(content) else content.decode()


class Attack:
    """Bodies that four clients send, each once."""

    def __init__(self, server: ServedProcess, seed: int, count: int) -> None:
        self.server = server
        self.draws = random.Random(seed)
        self.goods = good_bodies(json.loads(server.get("/openapi.json")))
        self.left = iter(range(count))
        self.statuses: Counter[str] = Counter()
        self.wrong: list[tuple[str, bytes, str]] = []
        self.anonymous: list[int] = []
        self.slowest = 0.0

    async def run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(4)))

    async def _client(self) -> None:
        for _ in self.left:
            good = self.draws.choice(self.goods)
            body, began = mutated(self.draws, good), monotonic()
            kind, trouble = await judged(self.server.port, good.path, body)
            self.slowest = max(self.slowest, monotonic() - began)
            self.statuses[kind] += 1
            self.anonymous.append(self.server.memory("RssAnon"))
            if trouble is not None:
                self.wrong.append((good.path, body[:1000], trouble))


def answers(server: ServedProcess, model: str) -> Iterator[Any]:
    body = {"model": model, "prompt": "the moon", "max_tokens": 20, "seed": 5, "logprobs": 2}
    status, content = asyncio.run(post(server.port, "/v1/completions", json.dumps(body).encode()))
    assert status == 200, content
    return json.loads(content)["choices"]


def test_hostile_bodies_are_refused_and_the_server_goes_on(tmp_path: Path, is_long: bool) -> None:
    seed, count = random.randrange(1 << 32), 10_000 if is_long else 1000
    print(f"seed {seed}, {count} bodies")
    model = str(write_model(tmp_path / "tiny.gguf"))
    options = ["--memory", "400MiB", "--draft", "off", "--context", str(CONTEXT)]
    log = tmp_path / "log"
    with served_process(model, *options, log=log) as server:
        before = answers(server, model)
        attack = Attack(server, seed, count)
        assert len(attack.goods) == 11
        asyncio.run(attack.run())
        server.wait_until_idle()
        grown = max(attack.anonymous) - max(attack.anonymous[: count // 2])
        peak, planned = server.memory("VmHWM"), server.plan()["plan"]["peak_bytes"]
        print(f"{attack.statuses}, slowest {attack.slowest:.2f} s")
        print(f"peak {peak / MIB:.1f} MiB, plan {planned / MIB:.1f}, grown {grown / MIB:.1f}")
        assert attack.wrong == []
        assert "Traceback" not in log.read_text()
        assert answers(server, model) == before
        assert peak <= planned
        assert grown <= 4 * MIB
