"""A program whose children end while threads of theirs run kernels: argument 1 threads, argument 2
times for each kernel. Prints each kernel and the exit codes of its children.

Only the border's own calls: what else lets go of Python's lock is not what is tried.
"""

import gc
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.numerics import oracle
from thinslice.kernels import native, native_pack
from thinslice.kernels.native import write_kv
from thinslice.kernels.native_stack import NativePrediction
from thinslice.kernels.ops import FeedForwardWeights, LayerWeights, Linear, PredictionWeights
from thinslice.kernels.packed import empty
from thinslice.kernels.paged_kv import PagedKv
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat

TOKENS, HEADS, DIM, BLOCK = 64, 4, 32, 16
SIZE = HEADS * DIM
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    vocab_size=1,
    hidden_size=SIZE,
    intermediate_size=SIZE,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    head_dim=DIM,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=TOKENS,
)


@dataclass(frozen=True)
class Held:
    """A call with addresses, and the arrays they are of."""

    function: Callable[..., object]
    arguments: tuple[object, ...]
    arrays: tuple[object, ...]

    def __call__(self) -> None:
        self.function(*self.arguments)


def kernel_calls() -> dict[str, Callable[[], object]]:
    """Each call that lets go of Python's lock, on arguments that are kept."""
    matrix = oracle.random_packed(PackedFormat.INT4, SIZE, SIZE, seed=0)
    wide = oracle.random_packed(PackedFormat.INT4, SIZE, 2 * SIZE, seed=1)
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((2, TOKENS, SIZE), np.float32)
    ones, half = np.ones(SIZE, np.float32), np.ones((TOKENS, DIM // 2), np.float32)
    heads_TNH = rng.standard_normal((TOKENS, HEADS, DIM), np.float32)
    positions = np.arange(TOKENS)
    starts, lengths = np.array([[0, TOKENS], [TOKENS, 0]], np.int32)
    tables = np.arange(TOKENS // BLOCK, dtype=np.int32)
    cache = PagedKv(*np.zeros((2, TOKENS // BLOCK, HEADS, BLOCK, DIM), np.float32))
    blocks = np.zeros((SIZE, SIZE // 32 * 18), np.uint8)
    numbers, bits = np.zeros((SIZE, SIZE), np.float32), np.zeros((SIZE, SIZE), np.uint16)
    other_bits = np.zeros_like(bits)
    repacked, memory = empty(PackedFormat.INT4, SIZE, SIZE), np.zeros(1 << 20, np.uint8)

    whole, block = Linear.resident(matrix), FeedForwardWeights(*[Linear.resident(matrix)] * 3)
    layer = LayerWeights(ones, whole, whole, whole, whole, None, None, ones, (block,))
    prediction = PredictionWeights(ones, ones, Linear.resident(wide), layer, ones)
    stack = NativePrediction(SHAPE, prediction, cache)
    workspace = np.empty(stack._stack.workspace(TOKENS) + 2 * TOKENS * SIZE, np.float32)
    sequences = (tables.ctypes.data, len(tables), starts.ctypes.data, lengths.ctypes.data, 1)
    at_T, half_TR = positions.ctypes.data, half.ctypes.data
    tokens = (x.ctypes.data, TOKENS, at_T, half_TR, half_TR, at_T)
    queries = (heads_TNH.ctypes.data, SIZE, out.ctypes.data, SIZE, TOKENS, HEADS)
    inputs = (tokens, sequences, workspace.ctypes.data)
    pair = (stack._around, (out.ctypes.data, x.ctypes.data))
    run_attention = native.library().attention
    held = (heads_TNH, starts, lengths, tables, x, out, positions, half, workspace, stack)
    return {
        "linear": lambda: native.linear(x, matrix, out=out),
        "linear of float32": lambda: native.linear(x, numbers, out=out),
        "linear of bfloat16": lambda: native.linear(x, bits, out=out),
        "rms_norm": lambda: native.rms_norm(x, ones, 1e-6, out=out),
        "rope": lambda: native.rope_(heads_TNH, positions, half, half),
        "silu_mul": lambda: native.silu_mul(x, x, out=out),
        "write_kv": lambda: write_kv(heads_TNH, heads_TNH, cache, positions),
        "attention": Held(run_attention, (cache.addresses, queries, sequences, 0.1, 0), held),
        "quantize": lambda: native_pack.quantize(numbers, repacked),
        "repack": lambda: native_pack.repack(blocks, "Q4_0", repacked),
        "convert": lambda: native_pack.convert(numbers, other_bits),
        "read_memory": lambda: native.read_memory(memory),
        "stack": Held(stack._stack.run, inputs, held),
        "prediction": Held(stack._stack.predict, (*inputs, *pair), held),
        "set_num_threads": lambda: native.set_num_threads(2),
    }


def start(call: Callable[[], object], num_threads: int) -> None:
    """Return once each of so many daemon threads has made the call, and makes it over and over."""
    begun = threading.Barrier(num_threads + 1)

    def repeat() -> None:
        call()
        begun.wait()
        while True:
            call()

    for _ in range(num_threads):
        threading.Thread(target=repeat, daemon=True).start()
    begun.wait()


def main(num_threads: int, times: int) -> None:
    native.set_num_threads(2)
    gc.freeze()  # spares each child the looking through all that was imported
    for name, call in kernel_calls().items():
        codes: Counter[int] = Counter()
        for _ in range(times):
            if child := os.fork():
                codes[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
                continue
            signal.alarm(30)
            start(call, num_threads)
            return
        print(name, dict(codes), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
