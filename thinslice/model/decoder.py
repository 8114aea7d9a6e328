"""The dense decoder: Llama, Mistral, Qwen2, Qwen3 and MiMo by the fields of one ModelShape.

Attribute names are the checkpoint's, so a state dict's keys are the names on disk. Modules are
built on the meta device and hold no bytes until weights are placed in them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from thinslice.kernels.dispatch import TORCH, Ops
from thinslice.kernels.native_stack import NativeStack
from thinslice.kernels.paged_kv import PagedKv
from thinslice.kernels.torch_ops import Rows
from thinslice.model.batch import ForwardBatch
from thinslice.model.rope import attention_factor, inverse_frequencies, rotary_tables
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packing import Packing

# First and last row of each slice of a matrix, and the rows [rows, in], in order.
RowSlices = Callable[[], Iterator[tuple[int, int, Rows]]]
# Token ids [T] to rows [T, D].
ReadRows = Callable[[torch.Tensor], torch.Tensor]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class _Operation(nn.Module):
    """A module that computes with one implementation of the operators; see ``Decoder.use``."""

    ops: Ops = TORCH


class Linear(_Operation):
    """``x @ weight.T + bias``, weight [out, in].

    With ``slices`` set the weight stays on the meta device, and its rows come slice by slice, each
    valid until the next is asked for. Extra memory: the output.
    """

    def __init__(self, in_features: int, out_features: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = _parameter(out_features, in_features)
        self.bias = _parameter(out_features) if has_bias else None
        self.slices: RowSlices | None = None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.slices is None:
            return self.ops.linear(x_TD, self.weight, self.bias)
        out = x_TD.new_empty(x_TD.shape[0], self.weight.shape[0])
        for start, stop, rows in self.slices():
            self.ops.linear(x_TD, rows, self._bias(start, stop), None, out[:, start:stop])
        return out

    def add_to(self, residual_TD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """``residual + self(x)``, in the place of ``residual``."""
        for start, stop, rows in self._all_slices():
            part = residual_TD[:, start:stop]
            self.ops.linear(x_TD, rows, self._bias(start, stop), part, part)
        return residual_TD

    def gate(self, gate_TF: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * self(x)``, in the place of ``gate``."""
        for start, stop, rows in self._all_slices():
            up = self.ops.linear(x_TD, rows, self._bias(start, stop))
            self.ops.swiglu_(gate_TF[:, start:stop], up)
        return gate_TF

    def tiles(
        self, x_TD: torch.Tensor, most_elements: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """``self(x)`` in tiles of at most so many elements, or of one row of a slice.

        Gives of each its first row and its first column, and the tile; a row's columns in order.
        """
        for start, stop, rows in self._all_slices():
            count = max(most_elements // (stop - start), 1)
            for first in range(0, len(x_TD), count):
                x_tile = x_TD[first : first + count]
                yield first, start, self.ops.linear(x_tile, rows, self._bias(start, stop))

    def _all_slices(self) -> Iterator[tuple[int, int, Rows]]:
        if self.slices is not None:
            return self.slices()
        return iter([(0, self.weight.shape[0], self.weight)])

    def _bias(self, start: int, stop: int) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[start:stop]


class RMSNorm(_Operation):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _parameter(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows of a table, weight [vocab, D]; with ``read_rows`` set they are fetched as needed."""

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = _parameter(num_rows, size)
        self.read_rows: ReadRows | None = None

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self.read_rows is not None:
            return self.read_rows(token_ids_T)
        return F.embedding(token_ids_T, self.weight)


@dataclass(frozen=True)
class LayerContext:
    """What a layer needs beside its weights: the batch, the rotary tables, its KV cache."""

    batch: ForwardBatch
    cos_TR: torch.Tensor
    sin_TR: torch.Tensor
    cache: PagedKv


class Attention(_Operation):
    """Grouped-query self-attention over the paged KV cache."""

    def __init__(self, shape: ModelShape, window: int | None) -> None:
        super().__init__()
        size, bias = shape.hidden_size, shape.attention_bias
        self.head_dim = shape.head_dim
        self.window = window
        self.q_proj = Linear(size, shape.q_size, bias)
        self.k_proj = Linear(size, shape.kv_size, bias)
        self.v_proj = Linear(size, shape.kv_size, bias)
        self.o_proj = Linear(shape.q_size, size, shape.attention_out_bias)
        if shape.use_qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.use_qk_norm = shape.use_qk_norm

    def forward(
        self, residual_TD: torch.Tensor, x_TD: torch.Tensor, context: LayerContext
    ) -> torch.Tensor:
        """Add the attention of ``x`` to the residual stream, in its place."""
        q_TNH = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKH = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.use_qk_norm:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH = self.ops.apply_rotary(q_TNH, context.cos_TR, context.sin_TR)
        k_TKH = self.ops.apply_rotary(k_TKH, context.cos_TR, context.sin_TR)
        batch = context.batch
        out_TNH = self.ops.attend(
            (q_TNH, k_TKH, v_TKH), context.cache, batch.slots_T, batch.sequences, self.window
        )
        return self.o_proj.add_to(residual_TD, out_TNH.flatten(1))


class MLP(nn.Module):
    """SwiGLU feed-forward of ``inner`` features: all of a layer's, or one block of them."""

    def __init__(self, size: int, inner: int, has_bias: bool, has_out_bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, has_bias)
        self.up_proj = Linear(size, inner, has_bias)
        self.down_proj = Linear(inner, size, has_out_bias)

    def forward(self, residual_TD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """Add the feed-forward of ``x`` to the residual stream, in its place."""
        inner_TF = self.up_proj.gate(self.gate_proj(x_TD), x_TD)
        return self.down_proj.add_to(residual_TD, inner_TF)


class SlicedMLP(nn.Module):
    """The feed-forward of a packed checkpoint, block after block; its whole inside never exists."""

    def __init__(self, shape: ModelShape, packing: Packing) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            MLP(shape.hidden_size, stop - start, shape.mlp_bias, shape.mlp_bias and start == 0)
            for start, stop in packing.blocks(shape.intermediate_size)
        )

    def forward(self, residual_TD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            residual_TD = block(residual_TD, x_TD)
        return residual_TD


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream in its place."""

    def __init__(
        self, shape: ModelShape, window: int | None, packing: Packing | None = None
    ) -> None:
        super().__init__()
        size, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.input_layernorm = RMSNorm(size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, window)
        self.post_attention_layernorm = RMSNorm(size, shape.rms_norm_eps)
        self.mlp = SlicedMLP(shape, packing) if packing else MLP(size, inner, bias, bias)
        self.has_gate_bias = bias

    def forward(self, x_TD: torch.Tensor, context: LayerContext) -> torch.Tensor:
        x_TD = self.self_attn(x_TD, self.input_layernorm(x_TD), context)
        return self.mlp(x_TD, self.post_attention_layernorm(x_TD))


class Rotary:
    """The rotary tables of a model for the positions of a batch."""

    def __init__(self, shape: ModelShape) -> None:
        self.inv_freq = inverse_frequencies(shape)
        self.factor = attention_factor(shape.rope_scaling)

    def tables(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_tables(self.inv_freq, positions_T, self.factor)


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: what checkpoints call ``model``."""

    def __init__(self, shape: ModelShape, packing: Packing | None) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderBlock(shape, shape.window_of(idx), packing)
            for idx in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Decoder(nn.Module):
    """A whole model without its multi-token-prediction layers.

    ``packing`` is that of a packed checkpoint, whose feed-forward is cut into blocks.

    Attributes:
        stack: the layers once more as one call into compiled code, where memory/fuse.py could make
            it.
        layer_rows: the most rows that a layer takes at a time; None takes all.
        hold_layer: in this context a layer's weights may be walked several times.
    """

    def __init__(self, shape: ModelShape, packing: Packing | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.model = DecoderStack(shape, packing)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        self.rotary = Rotary(shape)
        self.stack: NativeStack | None = None
        self.layer_rows: int | None = None
        self.hold_layer: Callable[[], AbstractContextManager[None]] = nullcontext
        self.tie_head()

    def tie_head(self) -> None:
        """Use the embedding table as the head if the shape ties the two."""
        if self.shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def use(self, ops: Ops) -> None:
        """Compute with these operators from now on."""
        for module in self.modules():
            if isinstance(module, _Operation):
                module.ops = ops

    def forward(self, batch: ForwardBatch, kv_caches: Sequence[PagedKv]) -> torch.Tensor:
        """Run a batch through all layers, each layer over all its rows before the next.

        Returns the residual stream [T, D] after the last layer, before the final norm: that is
        what a multi-token-prediction layer takes, and what ``logits`` takes.
        """
        parts = batch.parts(self.layer_rows or len(batch.token_ids_T))
        x_TD = self._embed(batch, parts)
        tables = [self.rotary.tables(part.positions_T) for _, part in parts]
        if self.stack is not None and self.stack.serves(kv_caches):
            for (rows, part), rotary in zip(parts, tables, strict=True):
                self.stack.run(x_TD[rows], rotary, part.slots_T, part.sequences)
            return x_TD
        for layer, cache in zip(self.model.layers, kv_caches, strict=True):
            with self.hold_layer() if len(parts) > 1 else nullcontext():
                for (rows, part), (cos_TR, sin_TR) in zip(parts, tables, strict=True):
                    layer(x_TD[rows], LayerContext(part, cos_TR, sin_TR, cache))
        return x_TD

    def _embed(self, batch: ForwardBatch, parts: list[tuple[slice, ForwardBatch]]) -> torch.Tensor:
        """The embedding rows [T, D]; of several parts one after the other, to copy little."""
        first_TD = self.model.embed_tokens(parts[0][1].token_ids_T)
        if len(parts) == 1:
            return first_TD
        x_TD = first_TD.new_empty(len(batch.token_ids_T), first_TD.shape[1])
        x_TD[parts[0][0]] = first_TD
        for rows, part in parts[1:]:
            x_TD[rows] = self.model.embed_tokens(part.token_ids_T)
        return x_TD

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] in float32 of rows of the residual stream."""
        return self.lm_head(self.model.norm(x_TD)).float()

    def logit_tiles(
        self, x_TD: torch.Tensor, most_elements: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The same logits in tiles of at most so many, or of one row of a slice of the head.

        Gives of each its first row and its first token id, and the tile, in float32.
        """
        for first_row, first_id, tile in self.lm_head.tiles(self.model.norm(x_TD), most_elements):
            yield first_row, first_id, tile.float()
