"""A child of a fork answers with the model it was given, or is told at once to load its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_llm import write_model

# The parent computes first: only then have the kernels threads that a child would wait for.
FORK = """
import os, signal, sys
from thinslice import LLM, SamplingParams
from thinslice.errors import RequestError
from thinslice.kernels import native
from thinslice.memory.meter import current_rss_bytes
from thinslice.plan import choose, search

native.set_num_threads(2)
if {streams}:
    choose.resident = lambda *_: ()
    search.with_pinned_slices = lambda case, plan: plan
greedy = SamplingParams(temperature=0, max_tokens=8)

def load(dtype, streams):
    beside = {beside} << 20
    return LLM(sys.argv[1], memory=current_rss_bytes() + beside, dtype=dtype, context=480)

llm = load({dtype!r}, {streams})
assert (llm.plan.streaming is not None) == {streams}
text = llm.generate("abc", greedy)[0].text
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    assert llm.generate("abc", greedy)[0].text == text
    sys.exit(os.waitstatus_to_exitcode(status))
signal.alarm(60)
{child}
"""
WORKS = """
assert llm.generate("abc", greedy)[0].text == text
llm.close()
"""
REFUSED = """
for call in (
    lambda: llm.generate("abc", greedy),
    lambda: llm.stream("abc", greedy),
    lambda: llm.engine.step(),
):
    try:
        call()
    except RequestError as error:
        assert "before a fork" in str(error) and "load it in the child" in str(error), error
    else:
        raise AssertionError("a model of another process ran")
llm.close()
own = load({dtype!r}, {streams})
assert own.generate("abc", greedy)[0].text == text
own.close()
"""


def assert_ends_well(code: str, folder: Path) -> None:
    """Run a program with the path of a model."""
    path = write_model(folder / "tiny.gguf")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("dtype", "streams", "child"),
    [
        ("int8", False, WORKS),
        ("float32", False, WORKS),
        ("bfloat16", False, WORKS),
        ("float32", True, REFUSED),
    ],
)
def test_a_child_of_a_fork(dtype: str, streams: bool, child: str, tmp_path: Path) -> None:
    filled = child.format(dtype=dtype, streams=streams)
    code = FORK.format(dtype=dtype, streams=streams, beside=400, child=filled)
    assert_ends_well(code, tmp_path)


SERVED = """
import asyncio, os, signal, sys
from thinslice import LLM, SamplingParams
from thinslice.engine.async_engine import AsyncEngine
from thinslice.errors import RequestError

llm = LLM(sys.argv[1], dtype="int8", context=480)
greedy = SamplingParams(temperature=0, max_tokens=8)

async def answer(engine):
    stream = await engine.submit("abc", greedy)
    return "".join([chunk.text async for delta in stream for chunk in delta.chunks])

async def parent():
    engine = AsyncEngine(llm)
    engine.start()
    return engine, await answer(engine)

async def own():
    async with AsyncEngine(llm) as engine:
        return await answer(engine)

loop = asyncio.new_event_loop()
engine, text = loop.run_until_complete(parent())
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    assert loop.run_until_complete(answer(engine)) == text
    loop.run_until_complete(engine.aclose())
    sys.exit(os.waitstatus_to_exitcode(status))
signal.alarm(60)
asyncio.set_event_loop(None)
loop.close = lambda: None  # at this process's end, what wakes the parent's loop would go with it
try:
    asyncio.run(answer(engine))
except RequestError as error:
    assert "make an AsyncEngine there" in str(error), error
else:
    raise AssertionError("a thread of another process served")
assert asyncio.run(own()) == text
"""


def test_a_child_of_a_fork_makes_an_async_engine_of_its_own(tmp_path: Path) -> None:
    assert_ends_well(SERVED, tmp_path)


HELD = """
import os, signal, sys, threading
import functools

made = []

def recorded(make):
    def recording():
        lock, frame = make(), sys._getframe(1)
        for _ in range(3):  # Condition and cached_property make theirs for us
            if frame is not None and frame.f_globals["__name__"].startswith("thinslice."):
                made.append(lock)
                break
            frame = frame and frame.f_back
        return lock
    return recording

threading.RLock = recorded(threading.RLock)
threading.Lock = recorded(threading.Lock)
functools.RLock = threading.RLock

from thinslice import LLM, Constraint, SamplingParams
from thinslice.engine.async_engine import AsyncEngine
from thinslice.forks import fork_waits
from thinslice.memory.ledger import ledger

greedy = SamplingParams(temperature=0, max_tokens=8)
form = SamplingParams(temperature=0, max_tokens=8, constraint=Constraint.regex("ab"))
asked = [{"role": "user", "content": "abc"}]

llm = LLM(sys.argv[1], dtype="int8", context=480)
text = llm.chat(asked, greedy).text
engine = AsyncEngine(llm)
is_held, may_end = threading.Event(), threading.Event()

def hold():
    for lock in made:
        if lock is not fork_waits:  # a fork waits for that one
            lock.acquire()
    is_held.set()
    may_end.wait()

assert len(made) > 5
thread = threading.Thread(target=hold, daemon=True)
thread.start()
is_held.wait()
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status))
signal.alarm(60)
assert llm.chat(asked, greedy).text == text
assert llm.generate("abc", form)[0].text == "ab"
assert llm.template.used_for([{}]) is llm.template
assert not engine.is_open
with ledger().planning():
    pass
llm.close()
"""


def test_a_child_takes_each_lock_that_another_thread_held(tmp_path: Path) -> None:
    assert_ends_well(HELD, tmp_path)


KEPT = """
import os, sys, threading
from thinslice.forks import fork_safe

lock = fork_safe(threading.RLock())
with lock:
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    waited = []
    thread = threading.Thread(target=lambda: waited.append(lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    assert waited == [False], "who forks in the middle of its work has it no more"
assert lock.acquire(blocking=False)
"""


def test_a_thread_that_forks_holds_its_own_lock_in_the_child(tmp_path: Path) -> None:
    assert_ends_well(KEPT, tmp_path)


IMPORTS = """
import os, signal, sys, threading
from thinslice import LLM, Constraint, SamplingParams

is_begun, is_forking = threading.Event(), threading.Event()

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "llguidance._tokenizer" and threading.current_thread() is thread:
            is_begun.set()
            is_forking.wait()

form = SamplingParams(temperature=0, max_tokens=8, constraint=Constraint.regex("ab"))
llm = LLM(sys.argv[1], dtype="int8", context=480)
sys.meta_path.insert(0, Finder())
thread = threading.Thread(target=lambda: llm.prepare("abc", form), daemon=True)
thread.start()
is_begun.wait()
os.register_at_fork(before=is_forking.set)
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status))
signal.alarm(60)
assert llm.generate("abc", form)[0].text == "ab"
"""


def test_a_fork_waits_for_an_import_in_another_thread(tmp_path: Path) -> None:
    assert_ends_well(IMPORTS, tmp_path)
