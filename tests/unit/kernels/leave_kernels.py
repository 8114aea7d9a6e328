"""A program whose children end while threads of theirs run kernels: argument 1 threads, argument 2
times for each kernel. Prints each kernel and the exit codes of its children.

Only the border's own calls: torch lets go of Python's lock in each operation of its own, and
aborts when the interpreter ends meanwhile.
"""

import gc
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.numerics import oracle
from thinslice.kernels import native
from thinslice.kernels.native_attention import write_kv
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
    """A call with addresses, and the tensors they are of."""

    function: Callable[..., object]
    arguments: tuple[object, ...]
    tensors: tuple[object, ...]

    def __call__(self) -> None:
        self.function(*self.arguments)


def kernel_calls() -> dict[str, Callable[[], object]]:
    """Each call that lets go of Python's lock, on arguments that are kept."""
    matrix = oracle.random_packed(PackedFormat.INT4, SIZE, SIZE, seed=0)
    wide = oracle.random_packed(PackedFormat.INT4, SIZE, 2 * SIZE, seed=1)
    x, out, ones = torch.randn(TOKENS, SIZE), torch.empty(TOKENS, SIZE), torch.ones(SIZE)
    heads_TNH = torch.randn(TOKENS, HEADS, DIM)
    positions, half = torch.arange(TOKENS), torch.ones(TOKENS, DIM // 2)
    starts, lengths = torch.tensor([[0, TOKENS], [TOKENS, 0]], dtype=torch.int32)
    tables = torch.arange(TOKENS // BLOCK, dtype=torch.int32)
    cache = PagedKv(*torch.zeros(2, TOKENS // BLOCK, HEADS, BLOCK, DIM))
    blocks = torch.zeros(SIZE, SIZE // 32 * 18, dtype=torch.uint8)
    repacked, memory = empty(PackedFormat.INT4, SIZE, SIZE), torch.zeros(1 << 20).byte()

    whole, block = Linear.resident(matrix), FeedForwardWeights(*[Linear.resident(matrix)] * 3)
    layer = LayerWeights(ones, whole, whole, whole, whole, None, None, ones, (block,))
    prediction = PredictionWeights(ones, ones, Linear.resident(wide), layer, ones)
    stack = NativePrediction(SHAPE, prediction, cache)
    workspace = torch.empty(stack._stack.workspace(TOKENS) + 2 * TOKENS * SIZE)
    sequences = (tables.data_ptr(), len(tables), starts.data_ptr(), lengths.data_ptr(), 1)
    at_T, half_TR = positions.data_ptr(), half.data_ptr()
    tokens = (x.data_ptr(), TOKENS, at_T, half_TR, half_TR, at_T)
    queries = (heads_TNH.data_ptr(), SIZE, out.data_ptr(), SIZE, 0, TOKENS, HEADS)
    inputs = (tokens, sequences, workspace.data_ptr())
    pair = (stack._around, (out.data_ptr(), x.data_ptr()))
    run_attention = native.library().attention
    held = (heads_TNH, starts, lengths, tables, x, out, positions, half, workspace, stack)
    return {
        "linear": lambda: native.linear(x, matrix, out=out),
        "gate_up_swiglu": lambda: native.gate_up_swiglu(x, matrix, matrix, out=out),
        "rms_norm": lambda: native.rms_norm(x, ones, 1e-6, out=out),
        "rope": lambda: native.rope_(heads_TNH, positions, half, half),
        "silu_mul": lambda: native.silu_mul(x, x, out=out),
        "write_kv": lambda: write_kv(heads_TNH, heads_TNH, cache, positions),
        "attention": Held(run_attention, (cache.addresses, queries, sequences, 0.1, 0), held),
        "repack": lambda: native.repack(blocks, "Q4_0", repacked),
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
    torch.set_num_threads(1)
    native.set_num_threads(2)
    gc.freeze()  # spares each child the looking through all that torch has made
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
