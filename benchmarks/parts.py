"""What each part of the process holds, one by one: `python -m benchmarks.parts`.

For each part fresh processes do what comes before it, look at what the kernel says they hold, do
the one step that brings the part, and look again. A figure is the median difference of --rounds
processes: anonymous pages (RssAnon), pages of files (RssFile), and what no other process shares
(Private_Clean and Private_Dirty of smaps_rollup). The rows marked + add up to what a command holds
when it plans. The last line of standard output is JSON. Needs Linux, and smollm2 in the store.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT, machine

ROUNDS, LARGE = 5, 151_680
FIELDS = ("RssAnon", "RssFile", "Private", "LazyFree", "KSM")
# Run in each process; in KiB, 0 where a kernel does not tell.
PROBE = """
import sys
def held():
    found = dict.fromkeys(sys.argv[1].split(","), 0)
    for name in ("status", "smaps_rollup"):
        for line in open(f"/proc/self/{name}"):
            key, _, value = line.partition(":")
            key = "Private" if key in ("Private_Clean", "Private_Dirty") else key
            if key in found:
                found[key] += int(value.split()[0])
    return found
"""
LIBRARIES = """
import numpy
import tokenizers
import hashlib
import jinja2.sandbox
import cyclopts, rich.console
"""
OURS = f"{LIBRARIES}\nimport thinslice.cli.exit_codes, thinslice.cli.run, thinslice.engine.llm"
OPENING = f"""{OURS}
from pathlib import Path
from thinslice.engine.prepare import open_files
from thinslice.store.store import Store
path = Store().ensure("smollm2")
"""
LARGE_TOKENIZER = f"""{OURS}
from pathlib import Path
from thinslice.checkpoint.index import Checkpoint
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.process import bound_allocator, return_free_pages
from thinslice.text.tokenizer import load_tokenizer
config = {{"architectures": ["Qwen2ForCausalLM"], "vocab_size": {LARGE}, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}}
checkpoint = Checkpoint(Path(sys.argv[2]), "safetensors", shape_from_config(config), {{}}, ())
bound_allocator()
"""
# Sixteen threads, one after the other, take 6 MiB in pieces and free all but the last one.
THREADS = """
import ctypes, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
end = threading.Event()
def work(done):
    pieces = [libc.malloc(64 << 10) for _ in range(96)]
    for piece in pieces: ctypes.memset(piece, 1, 64 << 10)
    for piece in pieces[:-1]: libc.free(piece)
    done.set()
    end.wait()
def run():
    for _ in range(16):
        done = threading.Event()
        threading.Thread(target=work, args=(done,), daemon=True).start()
        done.wait()
"""
IDLE = "import threading\nend = threading.Event()"
PRODUCT = """
import numpy as np
from thinslice.kernels import native
x, rows = np.ones((512, 512), np.float32), np.ones((512, 512), np.float32)
most = native.num_threads()
native.set_num_threads(1)
native.linear(x, rows)
"""
LOADED = """
from thinslice import LLM, SamplingParams
llm = LLM("smollm2", memory="1GiB", context=512)
"""


@dataclass(frozen=True)
class Part:
    """What is measured: what ``step`` brings after ``before``; without a step, all there is.

    Attributes:
        is_added: it is one of those that a command holds when it plans.
    """

    name: str
    before: str
    step: str
    is_added: bool = False


def after(line: str) -> str:
    """The libraries imported before the one of this line."""
    return LIBRARIES.partition(line)[0]


def library(name: str, line: str) -> Part:
    return Part(name, after(line), line, is_added=True)


PARTS = (
    library("NumPy", "import numpy"),
    library("tokenizers", "import tokenizers"),
    library("OpenSSL, of hashlib", "import hashlib"),
    library("Jinja", "import jinja2.sandbox"),
    library("cyclopts, rich", LIBRARIES.strip().splitlines()[-1]),
    Part("our modules", LIBRARIES, OURS.splitlines()[-1], is_added=True),
    Part("tokenizer of smollm2", OPENING, "opened = open_files(path)", is_added=True),
    Part(
        f"tokenizer of {LARGE:,} tokens",
        LARGE_TOKENIZER,
        "tokenizer = load_tokenizer(checkpoint)\nreturn_free_pages()",
    ),
    Part("the same, free pages kept", LARGE_TOKENIZER, "tokenizer = load_tokenizer(checkpoint)"),
    Part(
        "2,000 words encoded",
        f"{OPENING}tokenizer = open_files(path).tokenizer",
        "ids = tokenizer.encode(' '.join(f'w{n}x' for n in range(2000)), add_special_tokens=True)",
    ),
    Part(
        "a chat template, compiled",
        f"{OPENING}tokenizer = open_files(path).tokenizer",
        "template = tokenizer.chat_template",
    ),
    Part(
        "16 threads of Python",
        IDLE,
        "for _ in range(16): threading.Thread(target=end.wait, daemon=True).start()",
    ),
    Part("the kernels' threads", PRODUCT, "native.set_num_threads(most)\nnative.linear(x, rows)"),
    Part("16 threads' heaps, C library's defaults", THREADS, "run()"),
    Part(
        "16 threads' heaps, as bound_allocator sets it",
        f"from thinslice.process import bound_allocator\nbound_allocator()\n{THREADS}",
        "run()",
    ),
    Part("smollm2's first answer", LOADED, 'llm.generate(["Hi"], SamplingParams(max_tokens=8))'),
)


def run(part: Part, folder: Path) -> dict[str, int]:
    """KiB of each field that one process came to hold in the step."""
    lines = (PROBE, part.before, "before = held()", part.step, "after = held()")
    show = "import json\nprint(json.dumps([before, after]))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((*lines, show)), ",".join(FIELDS), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: {part.name}: {done.stderr.strip()}")
    before, behind = json.loads(done.stdout.splitlines()[-1])
    return {field: behind[field] - before[field] * bool(part.step) for field in FIELDS}


def measure(part: Part, folder: Path, rounds: int) -> dict[str, float]:
    """The medians, in MiB."""
    runs = [run(part, folder) for _ in range(rounds)]
    return {field: statistics.median(one[field] for one in runs) / 1024 for field in FIELDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    figures, added = {}, dict.fromkeys(FIELDS, 0.0)
    print(f"{'MiB':>48}{''.join(f'{field:>10}' for field in FIELDS)}")
    with tempfile.TemporaryDirectory() as name:
        write = [sys.executable, "-m", "tools.make_vocabulary", "--tokens", str(LARGE)]
        subprocess.run([*write, "--out", name], cwd=ROOT, check=True)
        for part in (Part("interpreter", "", "", is_added=True), *PARTS):
            row = figures[part.name] = measure(part, Path(name), arguments.rounds)
            added = {field: added[field] + row[field] * part.is_added for field in FIELDS}
            print_row(f"{part.name}{' +' if part.is_added else '  '}", row)
    print_row("sum of + ", added)
    report = {"benchmark": "parts", **machine(), "rounds": arguments.rounds}
    print(json.dumps({**report, "mib": figures, "sum": added}))


def print_row(name: str, row: dict[str, float]) -> None:
    print(f"{name:>48}{''.join(f'{row[field]:10.2f}' for field in FIELDS)}", flush=True)


if __name__ == "__main__":
    main()
