"""The dense decoder: Llama, Mistral, Qwen2, Qwen3 and MiMo by the fields of one ModelShape.

It holds no weights: they are an argument, wherever they lie. Values flow: what a function here is
given to add to, it returns, and the one before is not used again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Array
from thinslice.kernels.ops import LayerWeights, Ops, RotaryTables
from thinslice.kernels.paged_kv import PagedKv
from thinslice.kernels.rotary import Rotary
from thinslice.model.batch import ForwardBatch
from thinslice.model.weights import Weights
from thinslice.plan.model_shape import ModelShape


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs beside its weights.

    Attributes:
        cache: the layer's own.
        window: positions that a token sees, itself included; None for all.
    """

    ops: Ops
    shape: ModelShape
    batch: ForwardBatch
    rotary: RotaryTables
    cache: PagedKv
    window: int | None


@dataclass(frozen=True)
class _Part:
    """Rows that go through a layer together."""

    rows: slice
    batch: ForwardBatch
    rotary: RotaryTables


class Decoder:
    """A model of a shape, with its multi-token-prediction layers in model/mtp.py."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.rotary = Rotary(shape)

    def forward(self, batch: ForwardBatch, weights: Weights, kv_caches: Sequence[PagedKv]) -> Array:
        """Run a batch through all layers, each layer over all its rows before the next.

        Returns the residual stream [T, D] after the last layer, before the final norm: that is
        what a multi-token-prediction layer takes, and what ``logits`` takes.
        """
        parts = [
            _Part(rows, part, self.rotary_tables(part, weights.ops))
            for rows, part in batch.parts(weights.layer_rows or len(batch.token_ids_T))
        ]
        x_TD = _embed(parts, weights)
        fused = weights.fused
        if fused is not None and fused.serves(kv_caches):
            for part in parts:
                sequences = part.batch.sequences
                x_TD[part.rows] = fused.run(
                    x_TD[part.rows], part.rotary, part.batch.slots_T, sequences
                )
            return x_TD
        for idx, cache in zip(range(len(weights.layers)), kv_caches, strict=True):
            window = self.shape.window_of(idx)
            with weights.layer(idx, is_used_again=len(parts) > 1) as layer:
                for part in parts:
                    context = LayerContext(
                        weights.ops, self.shape, part.batch, part.rotary, cache, window
                    )
                    x_TD[part.rows] = run_layer(x_TD[part.rows], layer, context)
        return x_TD

    def rotary_tables(self, batch: ForwardBatch, ops: Ops) -> RotaryTables:
        """Cosine and sine of each token's position, where the operators take them."""
        cos_TR, sin_TR = self.rotary.tables(batch.positions_T)
        return ops.placed(cos_TR), ops.placed(sin_TR)

    def norm(self, x_TD: Array, weights: Weights) -> Array:
        """The final norm of rows of the residual stream."""
        return weights.ops.rms_norm(x_TD, weights.norm, self.shape.rms_norm_eps)

    def logits(self, x_TD: Array, weights: Weights) -> NDArray[np.float32]:
        """Logits [T, V] of rows of the residual stream, on the host."""
        ops = weights.ops
        return ops.to_host(ops.linear(self.norm(x_TD, weights), weights.head))

    def logit_tiles(
        self, x_TD: Array, weights: Weights, most_elements: int
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """The same logits in tiles of at most so many, or of one row of a slice of the head.

        The rows are normed in their place, as they may be all of a long text.

        Gives of each its first row and its first token id, and the tile.
        """
        normed_TD = weights.ops.rms_norm_(x_TD, weights.norm, self.shape.rms_norm_eps)
        for first_row, first_id, tile in weights.ops.linear_tiles(
            normed_TD, weights.head, most_elements
        ):
            yield first_row, first_id, weights.ops.to_host(tile)


def run_layer(x_TD: Array, layer: LayerWeights, context: LayerContext) -> Array:
    """Pre-norm attention and feed-forward, each added to the residual stream."""
    ops, eps = context.ops, context.shape.rms_norm_eps
    x_TD = _attention(x_TD, ops.rms_norm(x_TD, layer.input_norm, eps), layer, context)
    return _feed_forward(x_TD, ops.rms_norm(x_TD, layer.post_attention_norm, eps), layer, ops)


def _attention(
    residual_TD: Array, x_TD: Array, layer: LayerWeights, context: LayerContext
) -> Array:
    """``residual`` and the grouped-query self-attention of ``x`` over the paged KV cache."""
    ops, batch, eps = context.ops, context.batch, context.shape.rms_norm_eps
    heads = (len(x_TD), -1, context.shape.head_dim)
    q_TNH = ops.linear(x_TD, layer.query).reshape(heads)
    k_TKH = ops.linear(x_TD, layer.key).reshape(heads)
    v_TKH = ops.linear(x_TD, layer.value).reshape(heads)
    if layer.query_norm is not None and layer.key_norm is not None:
        q_TNH = ops.rms_norm(q_TNH, layer.query_norm, eps)
        k_TKH = ops.rms_norm(k_TKH, layer.key_norm, eps)
    q_TNH = ops.apply_rotary(q_TNH, *context.rotary)
    k_TKH = ops.apply_rotary(k_TKH, *context.rotary)
    out_TNH = ops.attend(
        (q_TNH, k_TKH, v_TKH), context.cache, batch.slots_T, batch.sequences, context.window
    )
    return ops.add_linear(residual_TD, out_TNH.reshape(len(x_TD), -1), layer.output)


def _feed_forward(residual_TD: Array, x_TD: Array, layer: LayerWeights, ops: Ops) -> Array:
    """``residual`` and the SwiGLU feed-forward of ``x``, block after block where it is cut into
    several: the whole of its inside never exists then."""
    for block in layer.blocks:
        inner_TF = ops.swiglu_linear(ops.linear(x_TD, block.gate), x_TD, block.up)
        residual_TD = ops.add_linear(residual_TD, inner_TF, block.down)
    return residual_TD


def _embed(parts: Sequence[_Part], weights: Weights) -> Array:
    """The embedding rows [T, D]; of several parts one after the other, to copy little."""
    first_TD = weights.embed(parts[0].batch.token_ids_T)
    if len(parts) == 1:
        return first_TD
    x_TD = weights.ops.empty(first_TD, (parts[-1].rows.stop, first_TD.shape[1]))
    x_TD[parts[0].rows] = first_TD
    for part in parts[1:]:
        x_TD[part.rows] = weights.embed(part.batch.token_ids_T)
    return x_TD
