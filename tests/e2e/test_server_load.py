"""Many clients at once: the budget holds, no place is lost, and answers are what they are alone."""

import asyncio
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import monotonic

from tests.e2e.test_ceiling import memory_group
from tests.load_clients import Asked, Choice, Load, choices_of, post
from tests.served_process import ServedProcess, served_process
from tests.tiny_llm import write_model
from thinslice.units import MIB, parse_bytes

KEYS = ("a-key-of-alice", "a-key-of-bob")
MEMORY = "420MiB"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


def chat(text: str, **more: object) -> Asked:
    messages = [{"role": "user", "content": text}]
    return Asked(CHAT, {"model": "smollm2", "messages": messages, "seed": 7, **more})


def text(prompt: object, **more: object) -> Asked:
    return Asked(TEXT, {"model": "smollm2", "prompt": prompt, "seed": 7, **more})


ASKED = [
    chat("Name three rivers.", max_tokens=16, temperature=0.8),
    chat("Why is the sky blue?", max_tokens=40, ignore_eos=True),
    chat("Say hello.", max_tokens=8, n=3, logprobs=True, top_logprobs=3),
    chat("Someone's name and age.", max_tokens=24, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}),
    chat("Look somebody up.", max_tokens=32, tools=[TOOL], tool_choice="required"),
    chat("The quick brown fox jumps. " * 60, max_tokens=4),
    text("Once upon a time", max_tokens=24, n=2, logprobs=2, temperature=1.2),
    text(["One", "Two, three"], max_tokens=6, echo=True, logprobs=1),
    text("The river", max_tokens=64, ignore_eos=True, stop=["\n\n\n\n"]),
]  # fmt: skip


async def alone(served: ServedProcess) -> list[dict[int, Choice]]:
    """The answers of each request without others beside it."""
    found = []
    for one in ASKED:
        status, content = await post(served.port, one.path, json.dumps(one.body).encode(), KEYS[0])
        assert status == 200, content
        found.append(choices_of([json.loads(content)]))
    return found


async def loaded(
    served: ServedProcess, seed: int, count: int, seconds: float
) -> tuple[Load, list[int]]:
    """Clients that ask for so long, and the server's anonymous memory meanwhile."""
    load = Load(served.port, ASKED, await alone(served), KEYS)
    until = monotonic() + seconds
    clients = [
        asyncio.create_task(load.client(random.Random(f"{seed} {place}"), until))
        for place in range(count)
    ]
    anonymous = []
    while not all(client.done() for client in clients):
        anonymous.append(served.memory("RssAnon"))
        await asyncio.sleep(0.1)
    await asyncio.gather(*clients)
    return load, anonymous


def keys_file(path: Path) -> Path:
    names = {key: hashlib.sha256(key.encode()).hexdigest() for key in KEYS}
    path.write_text("".join(f'[[key]]\nname = "{n}"\nsha256 = "{d}"\n' for n, d in names.items()))
    return path


def test_a_server_keeps_its_promises_under_load(
    tmp_path: Path, smollm2_path: Path, is_long: bool
) -> None:
    seed = random.randrange(1 << 32)
    count, seconds = (200, 120.0) if is_long else (24, 6.0)
    print(f"seed {seed}, {count} clients for {seconds} s")
    options = ["--memory", MEMORY, "--context", "1024", "--max-waiting", str(max(64, count + 56))]
    options += ["--keys", str(keys_file(tmp_path / "keys.toml"))]
    budget, log = parse_bytes(MEMORY), tmp_path / "log"
    with (
        memory_group(budget) as group,
        served_process("smollm2", *options, log=log, group=group, key=KEYS[0]) as served,
    ):
        if group is None:
            print("no memory control group can be made here: only the process's peak is checked")
        load, anonymous = asyncio.run(loaded(served, seed, count, seconds))
        served.wait_until_idle()
        planned, peak = served.plan()["plan"]["peak_bytes"], served.memory("VmHWM")
        half, quarter = len(anonymous) // 2, len(anonymous) // 4
        # What is held between peaks, as where a schema is compiled.
        before, last = min(anonymous[half:-quarter]), min(anonymous[-quarter:])
        tally = load.tally
        print(f"{tally.statuses}, {tally.finished} finished, errors {tally.errors}")
        print(f"peak {peak / MIB:.1f} MiB, plan {planned / MIB:.1f}, budget {budget / MIB:.1f}")
        print(f"anonymous {[one // MIB for one in anonymous[:: len(anonymous) // 16 or 1]]} MiB")
        assert tally.wrong == []
        assert tally.statuses.keys() <= {"200", "429", "left"}, log.read_text()[-2000:]
        assert tally.finished > count // 2
        assert peak <= planned <= budget
        # In a few seconds not every buffer has been as large as it gets.
        assert last <= before + (2 if is_long else 8) * MIB


def floor_of(*options: str) -> str:
    """The least budget that a server takes, which its refusal names."""
    called = [
        sys.executable,
        "-m",
        "thinslice",
        "serve",
        *options,
        "--port",
        "0",
        "--memory",
        "70MiB",
    ]
    refused = subprocess.run(called, capture_output=True, text=True, check=False)
    assert refused.returncode == 3, refused.stderr
    return refused.stderr.split("--memory ")[-1].split()[0]


def test_readers_of_nothing_make_a_server_hold_no_more_than_its_plan(
    tmp_path: Path, is_long: bool
) -> None:
    """At the least budget there is, and once they are gone others are answered as before."""
    count, pause_s, most = (150, 40.0, 480) if is_long else (24, 3.0, 120)
    model = str(write_model(tmp_path / "tiny.gguf"))
    options = ["--draft", "off"]
    memory = floor_of(model, *options)
    budget, log = parse_bytes(memory), tmp_path / "log"
    more: dict[str, object] = {"max_tokens": most, "ignore_eos": True, "stream": True, "n": 4}
    heavy, plain = (
        {**text("a", **more, **one).body, "model": model} for one in ({"logprobs": 20}, {})
    )
    whole = json.dumps({**plain, "n": 1, "stream": False}).encode()

    async def held(port: int) -> list[tuple[int, bytes]]:
        bodies = [json.dumps(heavy if place % 3 else plain).encode() for place in range(count)]
        return await asyncio.gather(*(post(port, TEXT, one, "", pause_s) for one in bodies))

    with (
        memory_group(budget) as group,
        served_process(model, *options, "--memory", memory, log=log, group=group) as served,
    ):
        before = asyncio.run(post(served.port, TEXT, whole))
        found = asyncio.run(held(served.port))
        served.wait_until_idle()
        after = asyncio.run(post(served.port, TEXT, whole))
        planned, peak = served.plan()["plan"]["peak_bytes"], served.memory("VmHWM")
        statuses = Counter(status for status, _ in found)
        print(statuses)
        print(f"peak {peak / MIB:.1f} MiB, plan {planned / MIB:.1f}, budget {budget / MIB:.1f}")
        assert statuses.keys() <= {200, 429}
        assert choices_of([json.loads(after[1])]) == choices_of([json.loads(before[1])])
        assert peak <= planned <= budget
