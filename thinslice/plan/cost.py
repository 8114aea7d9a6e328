"""Bytes of every part of a running model, as functions of its shape and token counts."""

from thinslice.plan.model_shape import ModelShape
from thinslice.units import MIB

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of one decoder layer."""
    size, inner = shape.hidden_size, shape.intermediate_size
    count = size * (shape.q_size + 2 * shape.kv_size) + shape.q_size * size + 3 * size * inner
    count += 2 * size
    if shape.attention_bias:
        count += shape.q_size + 2 * shape.kv_size
    if shape.attention_out_bias:
        count += size
    if shape.mlp_bias:
        count += 2 * inner + size
    if shape.use_qk_norm:
        count += 2 * shape.head_dim
    return count


def model_parameters(shape: ModelShape) -> int:
    """Parameters of the embedding, the layers, the final norm and an untied head; no MTP layer."""
    num_tables = 1 if shape.tie_word_embeddings else 2
    tables = num_tables * shape.vocab_size * shape.hidden_size
    return tables + shape.num_hidden_layers * layer_parameters(shape) + shape.hidden_size


def mtp_parameters(shape: ModelShape) -> int:
    """Parameters of one multi-token-prediction layer."""
    return layer_parameters(shape) + 2 * shape.hidden_size**2 + 3 * shape.hidden_size


def kv_bytes_per_token(shape: ModelShape, itemsize: int) -> int:
    """K and V of one position in all layers."""
    return 2 * shape.num_hidden_layers * shape.kv_size * itemsize


def activation_bytes(shape: ModelShape, chunk: int, context: int, itemsize: int) -> int:
    """The most that one layer's forward pass holds beside weights and KV cache.

    ``chunk`` tokens are in flight, and one sequence's K and V of ``context`` positions are gathered
    from their blocks; the causal mask of a chunk stands as booleans and as numbers. The residual
    stream lives throughout; of attention and feed-forward the larger counts.
    """
    residual = 2 * chunk * shape.hidden_size * itemsize
    norm = 2 * chunk * shape.hidden_size * 4
    heads = chunk * (shape.q_size + 2 * shape.kv_size)
    gathered = 2 * 2 * context * shape.kv_size * itemsize
    mask = chunk * context * (1 + itemsize)
    attention = heads * itemsize + 3 * heads * 4 + gathered + mask
    feed_forward = 4 * chunk * shape.intermediate_size * itemsize
    rotary = 4 * chunk * shape.head_dim * 4
    return residual + rotary + max(norm, attention, feed_forward)


def library_bytes(shape: ModelShape, chunk: int, itemsize: int) -> int:
    """What torch's libraries come to hold once they run: thread stacks, compiled kernels, and the
    packed operands of a matrix product.

    Measured on two cores with torch 2.13: up to 40 MiB after the first forward passes; in float32,
    whose products repack their operands, one more copy of the widest rows in flight.
    """
    base = 40 * MIB
    if itemsize == 2:
        return base
    widest = max(shape.intermediate_size, shape.hidden_size, shape.q_size)
    return base + chunk * (widest + shape.hidden_size) * itemsize


def logits_bytes(shape: ModelShape, num_rows: int, itemsize: int) -> int:
    """Logits of the rows sampled in one step: as computed, in float32, and while sorted."""
    per_row = shape.vocab_size * (itemsize + 4)
    sorting = shape.vocab_size * (4 + 8 + 4 + 8)
    return num_rows * per_row + sorting
