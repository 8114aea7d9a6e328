"""A program that holds a model by the Python API stays within the plan, however it calls."""

import subprocess
import sys
from pathlib import Path

from thinslice.units import MIB

# Prompts of ever new lengths: of each number of rows every array has another size.
LENGTHS = """
import random, sys
from thinslice import LLM, SamplingParams, Scheduling
from thinslice.memory.meter import peak_rss_bytes
llm = LLM("smollm2", memory=sys.argv[1], dtype=sys.argv[2], context=1024, draft="off")
params = SamplingParams(max_tokens=2)
rng = random.Random(0)
for length in range(5, 133, int(sys.argv[3])):
    tokens = [rng.randrange(49152) for _ in range(length)]
    llm.engine.add_request(tokens, params, scheduling=Scheduling(cache_salt=str(length)))
    while llm.engine.has_work:
        llm.engine.step()
print(peak_rss_bytes(), llm.plan.peak_bytes, llm.plan.budget_bytes)
"""
# One thread at a time, but always another one, all of which stay alive, as in a web server.
THREADS = """
import sys
from threading import Event, Thread
from thinslice import LLM, SamplingParams, Scheduling
from thinslice.memory.meter import peak_rss_bytes
llm = LLM("smollm2", memory=sys.argv[1], context=1024, max_num_seqs=1)
end = Event()
def answer(index, done):
    scheduling = Scheduling(cache_salt=str(index))
    llm.engine.add_request(list(range(300, 900)), SamplingParams(max_tokens=2), None, scheduling)
    while llm.engine.has_work:
        llm.engine.step()
    done.set()
    end.wait()
for index in range(16):
    done = Event()
    Thread(target=answer, args=(index, done), daemon=True).start()
    done.wait()
print(peak_rss_bytes(), llm.plan.peak_bytes, llm.plan.budget_bytes)
"""
# The same model again and again, each time with a prompt that fills its context.
AGAIN = """
import sys
from thinslice import LLM, SamplingParams
from thinslice.memory.meter import peak_rss_bytes
for turn in range(3):
    with LLM("smollm2", memory=sys.argv[1]) as llm:
        prompt = [index % 40000 for index in range(llm.plan.context - 8)]
        llm.engine.add_request(prompt, SamplingParams(max_tokens=2))
        while llm.engine.has_work:
            llm.engine.step()
        parts = dict(llm.plan.parts)
        held = parts["runtime"] + parts["tokenizer"]
        print(held, peak_rss_bytes(), llm.plan.peak_bytes)
    del llm  # which has its tokenizer still
"""
# Two models at once: the second is planned before the first has run.
TWO = """
import sys
from threading import Thread
from thinslice import LLM, SamplingParams
from thinslice.memory.meter import peak_rss_bytes
memory, dtype = sys.argv[1:]
models = [LLM("smollm2", memory=memory, dtype=dtype, context=1024, max_num_seqs=4) for _ in "ab"]
def answer(llm, index):
    prompt = ("one", "two", "six", "ten")[index] * 900
    llm.generate([prompt], SamplingParams(max_tokens=8, seed=index))
threads = [Thread(target=answer, args=(llm, index)) for llm in models for index in range(4)]
for one in threads: one.start()
for one in threads: one.join()
print(peak_rss_bytes(), models[1].plan.peak_bytes, models[1].plan.budget_bytes)
"""


def run(program: str, *arguments: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def measure(program: str, *arguments: str) -> tuple[int, int, int]:
    peak, planned, budget = run(program, *arguments)
    return peak, planned, budget


def test_prompts_of_ever_new_lengths(smollm2_path: Path, is_long: bool) -> None:
    """What was freed of one length is not kept beside what the next one takes."""
    peak, planned, budget = measure(LENGTHS, "435MiB", "bfloat16", "1" if is_long else "2")
    assert peak <= planned <= budget


def test_threads_that_take_turns(smollm2_path: Path) -> None:
    peak, planned, budget = measure(THREADS, "235MiB")
    assert peak <= planned <= budget


def test_a_model_after_another_is_planned_as_the_first(smollm2_path: Path) -> None:
    """Neither what the first held nor the libraries it woke is planned around."""
    numbers = run(AGAIN, "265MiB")
    held, peaks, planned = numbers[::3], numbers[1::3], numbers[2::3]
    assert max(held) <= held[0] + 6 * MIB
    assert min(held) >= held[0] - 2 * MIB
    assert all(peak <= most for peak, most in zip(peaks, planned, strict=True))


def test_two_models_at_once(smollm2_path: Path) -> None:
    """The second is planned above what the first will come to hold."""
    peak, planned, budget = measure(TWO, "2500MiB", "float32")
    assert peak <= planned <= budget
