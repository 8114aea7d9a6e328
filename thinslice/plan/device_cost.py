"""What a layer's forward pass holds on a card, where torch computes it."""

from thinslice.plan.model_shape import ModelShape


def activation_bytes(
    shape: ModelShape, chunk: int, context: int, *, itemsize: int, ffn_block: int
) -> int:
    """The most that one layer holds beside weights and KV cache.

    Norms and rotary embedding work in float32, one sequence's K and V of ``context`` positions are
    gathered from their blocks, and the causal mask of a chunk stands as booleans and as numbers.

    Args:
        itemsize: bytes of an activation.
        ffn_block: features of the feed-forward that exist at once.
    """
    stream = 2 * chunk * shape.hidden_size * itemsize
    rotary = 3 * chunk * shape.head_dim * 4
    heads = chunk * (shape.q_size + 2 * shape.kv_size) * itemsize
    if shape.use_qk_norm:  # what is normed stands beside what it was made of
        heads += chunk * (shape.q_size + shape.kv_size) * itemsize
    feed_forward = 2 * chunk * ffn_block * itemsize
    norm = 2 * chunk * shape.hidden_size * 4
    gathered = 2 * 2 * context * shape.kv_size * itemsize
    mask = chunk * context * (1 + itemsize)
    attention = heads + 3 * chunk * (shape.q_size + shape.kv_size) * 4 + gathered + mask
    return stream + rotary + max(norm, attention, feed_forward)
