"""Bytes of every part of a running model, as functions of its shape and token counts."""

from dataclasses import dataclass

from thinslice.plan.model_shape import ModelShape
from thinslice.units import KIB, MIB

KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def kv_bytes_per_token(shape: ModelShape, kv_dtype: str, num_mtp_layers: int = 0) -> int:
    """K and V of one position in all layers, prediction layers too; int8 has an fp16 scale for each
    head."""
    per_head = shape.head_dim * KV_BYTES[kv_dtype] + (2 if kv_dtype == "int8" else 0)
    num_layers = shape.num_hidden_layers + num_mtp_layers
    return 2 * num_layers * shape.num_key_value_heads * per_head


@dataclass(frozen=True)
class Computation:
    """How a forward pass is computed, as far as it matters to its memory.

    Attributes:
        ffn_block: features of the feed-forward that exist at once.
        is_packed: the matrices are, and what they are multiplied with is rounded for that.
        num_threads: of the compiled code.
    """

    ffn_block: int
    is_packed: bool
    num_threads: int


def activation_bytes(shape: ModelShape, chunk: int, how: Computation) -> int:
    """The most that one layer's forward pass holds beside weights and KV cache, all in float32.

    ``chunk`` tokens are in flight. The residual stream and its norm live throughout; of attention
    and feed-forward the larger counts.
    """
    throughout, heads, feed_forward = layer_bytes(shape, chunk, how.ffn_block, 4)
    attended = chunk * shape.q_size * 4
    return throughout + max(heads + attended, feed_forward) + _scratch(shape, chunk, how)


def layer_bytes(
    shape: ModelShape, chunk: int, ffn_block: int, itemsize: int
) -> tuple[int, int, int]:
    """What a layer holds throughout, while it attends and in its feed-forward, whoever computes.

    Args:
        ffn_block: features of the feed-forward that exist at once.
        itemsize: bytes of an activation; rotary tables are in float32.
    """
    stream = 2 * chunk * shape.hidden_size * itemsize
    rotary = 3 * chunk * shape.head_dim * 4
    heads = chunk * (shape.q_size + 2 * shape.kv_size) * itemsize
    if shape.use_qk_norm:  # what is normed stands beside what it was made of
        heads += chunk * (shape.q_size + shape.kv_size) * itemsize
    return stream + rotary, heads, 2 * chunk * ffn_block * itemsize


def whole_stream_bytes(shape: ModelShape, chunk: int) -> int:
    """The residual stream and the rotary tables of ``chunk`` tokens, whose layers take less of them
    at a time."""
    return chunk * (shape.hidden_size + shape.head_dim) * 4


def _scratch(shape: ModelShape, chunk: int, how: Computation) -> int:
    """What a product keeps of its rows: quantised ones, 84 bytes for 32 inputs (less where none is
    rounded to 16 bits), or float32 ones in another order."""
    widest = max(shape.hidden_size, shape.q_size, how.ffn_block)
    if not how.is_packed:
        return min(chunk, _NUMBER_ROWS_AT_ONCE) * (widest + 32) * 4
    return min(-(-chunk // 16) * 16, _ROWS_QUANTIZED_AT_ONCE) * widest * 84 // 32


def _attention_scratch(shape: ModelShape) -> int:
    """Bytes of one thread; see kernels/cpu/attention.cpp."""
    heads_per_kv = shape.num_attention_heads // shape.num_key_value_heads
    return 4 * (32 * heads_per_kv * (2 * shape.head_dim + 66) + 192 * shape.head_dim)


_ROWS_QUANTIZED_AT_ONCE, _NUMBER_ROWS_AT_ONCE = 512, 256
# Of a thread's stack; what a kernel touches.
_STACK_BYTES = 256 * KIB

# What callers hold, whatever they ask: prompts that wait, answers that were not taken yet, and what
# the allocator keeps for each of their threads.
CALLER_BYTES = 4 * MIB

# What the checkpoint reader works in while weights are read: a MiB of them, and what dequantising
# that takes.
LOADING_BYTES = 4 * MIB

# Of what libraries come to hold, pages of their code: NumPy's, the tokenizer's and the kernels';
# measured, 2 MiB.
LIBRARY_PAGES_BYTES = 4 * MIB


# Of the library that follows a grammar, its code and what importing it takes; of each token, and of
# each byte of its text, while its vocabulary is made. docs/grammar.md has what was measured.
_GRAMMAR_LIBRARY_BYTES = 8 * MIB
_GRAMMAR_BYTES_PER_TOKEN, _GRAMMAR_BYTES_PER_BYTE = 28, 42
# More than the mean of any published vocabulary here.
_TEXT_BYTES_PER_TOKEN = 9


def vocabulary_bytes(num_tokens: int, num_bytes: int | None = None) -> int:
    """What the vocabulary takes by which a grammar is followed, once for a model and from the first
    answer of a given form on.

    Args:
        num_bytes: of all tokens' text; None where they were not counted.
    """
    text_bytes = _TEXT_BYTES_PER_TOKEN * num_tokens if num_bytes is None else num_bytes
    tokens = _GRAMMAR_BYTES_PER_TOKEN * num_tokens + _GRAMMAR_BYTES_PER_BYTE * text_bytes
    return _GRAMMAR_LIBRARY_BYTES + tokens


def library_bytes(shape: ModelShape, how: Computation) -> int:
    """What libraries come to hold once they run. Each of the kernels' threads has a stack and what
    attention works in."""
    threads = how.num_threads * (_attention_scratch(shape) + _STACK_BYTES)
    return LIBRARY_PAGES_BYTES + MIB + threads


def logits_bytes(shape: ModelShape, num_rows: int) -> int:
    """Logits of the rows sampled in one step, and one row while it is sorted."""
    sorting = shape.vocab_size * (4 + 8 + 4 + 8)
    return num_rows * shape.vocab_size * 4 + sorting


# Rows that a prediction layer takes at a time: a prompt's need not exist side by side once more.
PREDICTION_ROWS = 256


# Rows of a sequence that wait for it at most, while nothing is drafted with it.
PREDICTION_ROWS_HELD = 32


def prediction_activation_bytes(shape: ModelShape, chunk: int, num_seqs: int) -> int:
    """What a prediction layer holds beside what one of the model's layers does: the residual stream
    of the rows that wait, and of those it works on the model's stream, both norms and their
    concatenation.
    """
    num_rows = num_seqs * PREDICTION_ROWS_HELD + 5 * min(chunk, PREDICTION_ROWS)
    return num_rows * shape.hidden_size * 4


def ngram_index_bytes(capacity: int, num_lengths: int = 3) -> int:
    """Bytes of the n-gram index of one sequence: four for each token it can come to hold, and eight
    for each length that is looked up."""
    return 4 * capacity + num_lengths * 4 * ngram_table_size(capacity)


def ngram_table_size(capacity: int) -> int:
    """Places in the table of one length, which is at most half full."""
    return 2 * capacity + 1
