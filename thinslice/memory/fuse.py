"""Layers of a decoder as one call into compiled code, where its weights allow it."""

from collections.abc import Iterable

import torch
from torch import nn

from thinslice.kernels.native_stack import NativeStack, StackLayer, StackMatrix, StackShape
from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.weight_store import WeightStore
from thinslice.model.decoder import MLP, Decoder, DecoderBlock, Linear


def fuse(
    decoder: Decoder, blocks: Iterable[nn.Module], weights: WeightStore, kv_caches: list[PagedKv]
) -> NativeStack | None:
    """Some layers of a decoder in one call, or None: a matrix is streamed or not packed, or gate or
    up has a bias.

    Args:
        kv_caches: one for each of the layers.
    """
    names = {module: name for name, module in decoder.named_modules()}

    def matrix(linear: Linear) -> StackMatrix | None:
        weight = weights.resident(f"{names[linear]}.weight")
        return None if weight is None else StackMatrix(weight, _vector(linear.bias))

    layers = []
    for block in blocks:
        assert isinstance(block, DecoderBlock), "a layer of another kind"
        parts = (block.self_attn, block.mlp)
        linears = [one for part in parts for one in part.modules() if isinstance(one, Linear)]
        matrices = {linear: matrix(linear) for linear in linears}
        if block.has_gate_bias or None in matrices.values():
            return None
        layers.append(_layer(block, {k: v for k, v in matrices.items() if v is not None}))
    shape = decoder.shape
    sizes = StackShape(
        hidden_size=shape.hidden_size,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        eps=shape.rms_norm_eps,
    )
    return NativeStack(sizes, layers, kv_caches)


def _layer(block: DecoderBlock, matrices: dict[Linear, StackMatrix]) -> StackLayer:
    attention = block.self_attn
    has_norms = attention.use_qk_norm
    return StackLayer(
        norms=(
            block.input_layernorm.weight.data,
            attention.q_norm.weight.data if has_norms else None,
            attention.k_norm.weight.data if has_norms else None,
            block.post_attention_layernorm.weight.data,
        ),
        attention=(
            matrices[attention.q_proj],
            matrices[attention.k_proj],
            matrices[attention.v_proj],
            matrices[attention.o_proj],
        ),
        blocks=[
            (matrices[mlp.gate_proj], matrices[mlp.up_proj], matrices[mlp.down_proj])
            for mlp in block.mlp.modules()
            if isinstance(mlp, MLP)
        ],
        window=attention.window or 0,
    )


def _vector(bias: torch.nn.Parameter | None) -> torch.Tensor | None:
    return None if bias is None else bias.data
