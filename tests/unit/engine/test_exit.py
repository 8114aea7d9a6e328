"""A program that ends while a step runs in another thread ends in peace."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_llm import write_model

START = """
import asyncio, os, sys, threading
from thinslice import LLM, SamplingParams
from thinslice.engine.async_engine import AsyncEngine
import torch

params = SamplingParams(ignore_eos=True, max_tokens=None, seed=1)
llm = LLM(sys.argv[1], memory="1GiB", context=480, dtype=sys.argv[2], max_num_seqs=2)

torch.set_num_threads(1)

def generate():
    while True:
        llm.generate("abc", params)
"""
WAYS = {
    "an open AsyncEngine": """
async def main():
    engine = AsyncEngine(llm)
    engine.start()
    await anext(await engine.submit("abc", params))
    await anext(await engine.submit("abc", params))

asyncio.run(main())
""",
    "a daemon thread in a step": """
threading.Thread(target=generate, daemon=True).start()
while not llm.engine.metrics.steps:
    pass
""",
    "several daemon threads": """
for _ in range(3):
    threading.Thread(target=generate, daemon=True).start()
while llm.engine.metrics.steps < 3:
    pass
""",
    "many that give short answers": """
def answer():
    while True:
        llm.generate("abc", SamplingParams(ignore_eos=True, max_tokens=2))

for _ in range(8):
    threading.Thread(target=answer, daemon=True).start()
while llm.engine.metrics.steps < 9:
    pass
""",
    "a thread that is waited for": """
def once():
    llm.generate("abc", SamplingParams(max_tokens=30))
    print("done")

threading.Thread(target=once).start()
""",
    "a fork of a program with a step under way": """
threading.Thread(target=generate, daemon=True).start()
while not llm.engine.metrics.steps:
    pass
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
""",
    "a stream that is under way": """
streams = [llm.stream("abc", params)]
next(streams[0])

def hold():
    return streams
""",
    "an error of its own": """
threading.Thread(target=generate, daemon=True).start()
while not llm.engine.metrics.steps:
    pass
sys.exit(7)
""",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_program_ends_with_its_own_exit_code(way: str, dtype: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    code = START + WAYS[way]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), dtype],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (7 if "error" in way else 0), done.stderr
    assert done.stderr == ""
    assert done.stdout == ("done\n" if "waited for" in way else "")
