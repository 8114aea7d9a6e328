"""Layers of a decoder as one call into compiled code, where its weights allow it."""

from torch import nn

from thinslice.kernels.native_stack import (
    NativePrediction,
    NativeStack,
    StackLayer,
    StackMatrix,
    StackPairing,
    StackShape,
)
from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.weight_store import WeightStore
from thinslice.model.decoder import MLP, Decoder, DecoderBlock, Linear
from thinslice.model.mtp import MTPDecoder, MTPLayer


def fuse(decoder: Decoder, weights: WeightStore, kv_caches: list[PagedKv]) -> NativeStack | None:
    """All layers of a decoder in one call, or None: a matrix is streamed or not packed, or gate or
    up has a bias."""
    matrices = _Matrices(decoder, weights)
    layers = [_layer(block, matrices) for block in decoder.model.layers]
    known = [layer for layer in layers if layer is not None]
    return NativeStack(_sizes(decoder), known, kv_caches) if len(known) == len(layers) else None


def fuse_prediction(
    decoder: MTPDecoder, layer: MTPLayer, weights: WeightStore, kv_cache: PagedKv
) -> NativePrediction | None:
    """Fuse a prediction layer with the norms and the projection around it."""
    matrices = _Matrices(decoder, weights)
    block, projection = _layer(layer, matrices), matrices.of(layer.input_proj)
    if block is None or projection is None:
        return None
    pairing = StackPairing(
        hidden_norm=layer.hidden_layernorm.weight.data,
        token_norm=layer.token_layernorm.weight.data,
        projection=projection,
        final_norm=layer.final_layernorm.weight.data,
    )
    return NativePrediction(_sizes(decoder), block, kv_cache, pairing)


class _Matrices:
    """Packed matrices of a decoder that lie in memory as a whole."""

    def __init__(self, decoder: Decoder, weights: WeightStore) -> None:
        self._names = {module: name for name, module in decoder.named_modules()}
        self._weights = weights

    def of(self, linear: Linear) -> StackMatrix | None:
        weight = self._weights.resident(f"{self._names[linear]}.weight")
        bias = None if linear.bias is None else linear.bias.data
        return None if weight is None else StackMatrix(weight, bias)


def _sizes(decoder: Decoder) -> StackShape:
    shape = decoder.shape
    return StackShape(
        hidden_size=shape.hidden_size,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        eps=shape.rms_norm_eps,
    )


def _layer(block: nn.Module, every: _Matrices) -> StackLayer | None:
    """A decoder's block, where all of it lies in memory and gate and up have no bias."""
    assert isinstance(block, DecoderBlock), "a layer of another kind"
    parts = (block.self_attn, block.mlp)
    linears = [one for part in parts for one in part.modules() if isinstance(one, Linear)]
    found = {linear: every.of(linear) for linear in linears}
    matrices = {linear: matrix for linear, matrix in found.items() if matrix is not None}
    if block.has_gate_bias or len(matrices) < len(linears):
        return None
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
