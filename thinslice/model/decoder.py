"""The dense decoder: Llama, Mistral, Qwen2, Qwen3 and MiMo by the fields of one ModelShape.

Attribute names are the checkpoint's, so a state dict's keys are the names on disk. Modules are
built on the meta device and hold no bytes until weights are placed in them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from thinslice.kernels import torch_ops
from thinslice.model.batch import ForwardBatch
from thinslice.model.rope import attention_factor, inverse_frequencies, rotary_tables
from thinslice.plan.model_shape import ModelShape

KVCaches = Sequence[tuple[torch.Tensor, torch.Tensor]]
# First row and rows [rows, in] of each slice of a matrix, in order.
RowSlices = Callable[[], Iterator[tuple[int, torch.Tensor]]]
# Token ids [T] to rows [T, D].
ReadRows = Callable[[torch.Tensor], torch.Tensor]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """``x @ weight.T + bias``, weight [out, in].

    With ``slices`` set the weight stays on the meta device, and its rows come slice by slice, each
    valid until the next is asked for. Extra memory: the output of one slice.
    """

    def __init__(self, in_features: int, out_features: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = _parameter(out_features, in_features)
        self.bias = _parameter(out_features) if has_bias else None
        self.slices: RowSlices | None = None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.slices is None:
            return F.linear(x_TD, self.weight, self.bias)
        out = x_TD.new_empty(*x_TD.shape[:-1], self.weight.shape[0])
        for start, rows in self.slices():
            stop = start + rows.shape[0]
            bias = None if self.bias is None else self.bias[start:stop]
            out[..., start:stop] = F.linear(x_TD, rows, bias)
        return out


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _parameter(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_ops.rms_norm(x, self.weight, self.eps)


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
    cos_TH: torch.Tensor
    sin_TH: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
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

    def forward(self, x_TD: torch.Tensor, context: LayerContext) -> torch.Tensor:
        q_TNH = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKH = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.use_qk_norm:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH = torch_ops.apply_rotary(q_TNH, context.cos_TH, context.sin_TH)
        k_TKH = torch_ops.apply_rotary(k_TKH, context.cos_TH, context.sin_TH)
        k_cache, v_cache = context.caches
        torch_ops.write_kv(k_cache, k_TKH, context.batch.slots_T)
        torch_ops.write_kv(v_cache, v_TKH, context.batch.slots_T)
        spans = [(s.start, s.stop, s.num_positions, s.block_table) for s in context.batch.spans]
        out_TNH = torch_ops.paged_attention(q_TNH, context.caches, spans, self.window)
        return self.o_proj(out_TNH.flatten(1))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        size, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate_proj = Linear(size, inner, bias)
        self.up_proj = Linear(size, inner, bias)
        self.down_proj = Linear(inner, size, bias)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch_ops.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, shape: ModelShape, window: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, window)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_TD: torch.Tensor, context: LayerContext) -> torch.Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), context)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Rotary:
    """The rotary tables of a model for the positions of a batch."""

    def __init__(self, shape: ModelShape) -> None:
        self.inv_freq = inverse_frequencies(shape)
        self.factor = attention_factor(shape.rope_scaling)

    def tables(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_tables(self.inv_freq, positions_T, self.factor)


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: what checkpoints call ``model``."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderBlock(shape, shape.window_of(i)) for i in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Decoder(nn.Module):
    """A whole model without its multi-token-prediction layers."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = DecoderStack(shape)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        self.rotary = Rotary(shape)
        self.tie_head()

    def tie_head(self) -> None:
        """Where the shape says so, let the head be the embedding table that is now in place."""
        if self.shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch: ForwardBatch, kv_caches: KVCaches) -> torch.Tensor:
        """Run a batch through all layers.

        Returns the residual stream [T, D] after the last layer, before the final norm: that is
        what a multi-token-prediction layer takes, and what ``logits`` takes.
        """
        x_TD = self.model.embed_tokens(batch.token_ids_T)
        cos_TH, sin_TH = self.rotary.tables(batch.positions_T)
        for layer, caches in zip(self.model.layers, kv_caches, strict=True):
            x_TD = layer(x_TD, LayerContext(batch, cos_TH, sin_TH, caches))
        return x_TD

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] in float32 of rows of the residual stream."""
        return self.lm_head(self.model.norm(x_TD)).float()
