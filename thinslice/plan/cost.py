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
        itemsize: bytes of an activation.
        ffn_block: features of the feed-forward that exist at once.
        is_native: norms, rotary embedding and attention run in compiled code.
        is_packed: so do the matrix products.
        num_threads: of the compiled code.
    """

    itemsize: int
    ffn_block: int
    is_native: bool
    is_packed: bool
    num_threads: int


def activation_bytes(shape: ModelShape, chunk: int, context: int, how: Computation) -> int:
    """The most that one layer's forward pass holds beside weights and KV cache.

    ``chunk`` tokens are in flight. The residual stream and its norm live throughout; of attention
    and feed-forward the larger counts. In torch, norms and rotary embedding work in float32, one
    sequence's K and V of ``context`` positions are gathered from their blocks, and the causal mask
    of a chunk stands as booleans and as numbers.
    """
    stream = 2 * chunk * shape.hidden_size * how.itemsize
    rotary = 3 * chunk * shape.head_dim * 4
    heads = chunk * (shape.q_size + 2 * shape.kv_size) * how.itemsize
    if shape.use_qk_norm:  # what is normed stands beside what it was made of
        heads += chunk * (shape.q_size + shape.kv_size) * how.itemsize
    attended = chunk * shape.q_size * how.itemsize
    feed_forward = 2 * chunk * how.ffn_block * how.itemsize
    if how.is_native:
        return stream + rotary + max(heads + attended, feed_forward) + _scratch(shape, chunk, how)
    norm = 2 * chunk * shape.hidden_size * 4
    gathered = 2 * 2 * context * shape.kv_size * how.itemsize
    mask = chunk * context * (1 + how.itemsize)
    attention = heads + 3 * chunk * (shape.q_size + shape.kv_size) * 4 + gathered + mask
    return stream + rotary + max(norm, attention, feed_forward)


def whole_stream_bytes(shape: ModelShape, chunk: int, how: Computation) -> int:
    """The residual stream and the rotary tables of ``chunk`` tokens, whose layers take less of them
    at a time."""
    return chunk * (shape.hidden_size * how.itemsize + shape.head_dim * 4)


def _scratch(shape: ModelShape, chunk: int, how: Computation) -> int:
    """What the kernels keep: rows quantised for a product (84 bytes for 32 inputs, less where none
    is rounded to 16 bits), and the output of a product in torch before it is added to the residual
    stream."""
    if not how.is_packed:
        return chunk * shape.hidden_size * how.itemsize
    widest = max(shape.hidden_size, shape.q_size, how.ffn_block)
    return min(-(-chunk // 16) * 16, _ROWS_QUANTIZED_AT_ONCE) * widest * 84 // 32


def _attention_scratch(shape: ModelShape) -> int:
    """Bytes of one thread; see kernels/cpu/attention.cpp."""
    heads_per_kv = shape.num_attention_heads // shape.num_key_value_heads
    return 4 * (32 * heads_per_kv * (2 * shape.head_dim + 66) + 192 * shape.head_dim)


_ROWS_QUANTIZED_AT_ONCE = 512
# Of a thread's stack; what a kernel touches.
_STACK_BYTES = 256 * KIB


# oneDNN compiles a bfloat16 product for each number of rows it meets, and keeps what it compiled
# whatever its cache is bounded to: prompts of ever new lengths took 1.4 MB each for SmolLM2's five
# shapes of matrices, without an end. Other families have six.
_ONEDNN_BYTES_PER_ROWS = 9 * MIB // 4


def padded_rows(num_rows: int) -> int:
    """The rows that a bfloat16 product of so many is computed with; beyond 64 a fourth more
    at most.

    There are few such numbers, so that few products are compiled.
    """
    if num_rows <= 4:
        return num_rows
    step = max(1 << max((num_rows - 1).bit_length() - 3, 0), 16 if num_rows > 16 else 8)
    return -(-num_rows // step) * step


def num_padded_rows(most: int) -> int:
    """How many numbers ``padded_rows`` gives for up to ``most`` rows."""
    return len({padded_rows(num_rows) for num_rows in range(1, most + 1)})


# What callers hold, whatever they ask: prompts that wait, answers that were not taken yet, and what
# the allocator keeps for each of their threads.
CALLER_BYTES = 4 * MIB

# Of what libraries come to hold, pages of their code: measured, 12.5 MiB.
LIBRARY_PAGES_BYTES = 12 * MIB


def library_bytes(shape: ModelShape, chunk: int, how: Computation) -> int:
    """What libraries come to hold once they run: thread stacks, compiled kernels, and the packed
    operands of a matrix product.

    Measured on two cores with torch 2.13: up to 40 MiB after the first forward passes; in float32,
    whose products repack their operands, one more copy of the widest rows in flight, as in
    bfloat16, whose rows are padded. Packed
    matrices never enter torch's products: up to 13 MiB beside them, with MiMo-7B's shape and a
    prompt of 4,000 tokens. Each of the kernels' threads has a stack and what attention works in.
    """
    threads = how.num_threads * (_attention_scratch(shape) + _STACK_BYTES)
    if how.is_packed:
        return LIBRARY_PAGES_BYTES + 2 * MIB + threads
    widest = max(shape.intermediate_size, shape.hidden_size, shape.q_size)
    if how.itemsize == 2:
        compiled = LIBRARY_PAGES_BYTES + num_padded_rows(chunk) * _ONEDNN_BYTES_PER_ROWS
        return compiled + threads + padded_rows(chunk) * widest * how.itemsize
    base = 40 * MIB + threads
    return base + chunk * (widest + shape.hidden_size) * how.itemsize


def logits_bytes(shape: ModelShape, num_rows: int, itemsize: int) -> int:
    """Logits of the rows sampled in one step: as computed, in float32, and while sorted."""
    per_row = shape.vocab_size * (itemsize + 4 if itemsize < 4 else 4)
    sorting = shape.vocab_size * (4 + 8 + 4 + 8)
    return num_rows * per_row + sorting


# Kernels that oneDNN compiles for a prediction layer come beside the model's, and with its drafts
# the number of rows changes from step to step. Measured on a model of 0.2 GB: peaks of 10 to 28 MB
# more than with two of them kept.
PREDICTION_KERNEL_BYTES = 28 * MIB

# Rows that a prediction layer takes at a time: a prompt's need not exist side by side once more.
PREDICTION_ROWS = 256


# Rows of a sequence that wait for it at most, while nothing is drafted with it.
PREDICTION_ROWS_HELD = 32


def prediction_activation_bytes(
    shape: ModelShape, chunk: int, num_seqs: int, how: Computation
) -> int:
    """What a prediction layer holds beside what one of the model's layers does: the residual stream
    of the rows that wait, and of those it works on the model's stream, both norms and their
    concatenation.
    """
    num_rows = num_seqs * PREDICTION_ROWS_HELD + 5 * min(chunk, PREDICTION_ROWS)
    return num_rows * shape.hidden_size * how.itemsize


def ngram_index_bytes(capacity: int, num_lengths: int = 3) -> int:
    """Bytes of the n-gram index of one sequence: four for each token it can come to hold, and eight
    for each length that is looked up."""
    return 4 * capacity + num_lengths * 4 * ngram_table_size(capacity)


def ngram_table_size(capacity: int) -> int:
    """Places in the table of one length, which is at most half full."""
    return 2 * capacity + 1
