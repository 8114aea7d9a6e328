"""The border to all layers of a decoder in one call, where every packed matrix lies in memory.

The same kernels in the same order as one operator after the other, and so the same bits; what it
saves is Python between them: of a model of 135M parameters a third of the time of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thinslice.kernels.native import FORMAT_CODES, check_indices, check_vector, library
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch


@dataclass(frozen=True, eq=False)
class StackMatrix:
    """A packed matrix and its bias, float32 or None."""

    weight: PackedWeight
    bias: torch.Tensor | None = None

    def address(self, out_features: int, in_features: int) -> tuple[int, int, int, int, int]:
        """What crosses the border of a matrix of this size."""
        weight, bias = self.weight, self.bias
        found = (weight.out_features, weight.in_features)
        if found != (out_features, in_features):
            raise ValueError(f"expected a matrix {(out_features, in_features)}, got {found}")
        if bias is not None:
            check_vector(bias, weight.out_features, "bias")
        bias_address = 0 if bias is None else bias.data_ptr()
        return (
            weight.data.data_ptr(),
            FORMAT_CODES[weight.format],
            int(weight.is_wide),
            weight.out_features,
            bias_address,
        )


@dataclass(frozen=True, eq=False)
class StackLayer:
    """One layer.

    Attributes:
        norms: input, q, k and post-attention norm, float32; q and k may be None.
        attention: q, k, v and o.
        blocks: gate, up (both without bias) and down of each block of the feed-forward.
        window: positions a token sees; 0 for all.
    """

    norms: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]
    attention: tuple[StackMatrix, StackMatrix, StackMatrix, StackMatrix]
    blocks: Sequence[tuple[StackMatrix, StackMatrix, StackMatrix]]
    window: int


@dataclass(frozen=True, eq=False)
class StackPairing:
    """What stands around a prediction layer's block; the norms are float32.

    Attributes:
        projection: [D, 2 D], of the normed hidden state and the normed token side by side.
    """

    hidden_norm: torch.Tensor
    token_norm: torch.Tensor
    projection: StackMatrix
    final_norm: torch.Tensor

    def addresses(self, size: int) -> tuple[int, int, tuple[int, int, int, int, int], int]:
        """What crosses the border, for a hidden state of this size."""
        for norm in (self.hidden_norm, self.token_norm, self.final_norm):
            check_vector(norm, size, "norm")
        norms = (self.hidden_norm.data_ptr(), self.token_norm.data_ptr())
        return (*norms, self.projection.address(size, 2 * size), self.final_norm.data_ptr())


@dataclass(frozen=True)
class StackShape:
    """Sizes that all layers share."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


class NativeStack:
    """Layers with their KV caches, checked once."""

    def __init__(
        self, shape: StackShape, layers: Sequence[StackLayer], kv_caches: Sequence[PagedKv]
    ) -> None:
        # The addresses inside hold only as long as these do.
        self._layers, self._caches = tuple(layers), tuple(kv_caches)
        self._shape = shape
        self._stack = library().Stack(
            shape.hidden_size,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.eps,
            shape.head_dim**-0.5,
        )
        for layer, cache in zip(self._layers, self._caches, strict=True):
            self._add(layer, cache)

    def serves(self, kv_caches: Sequence[PagedKv]) -> bool:
        """Whether these are the caches it was made with."""
        return len(kv_caches) == len(self._caches) and all(
            one is other for one, other in zip(kv_caches, self._caches, strict=True)
        )

    def run(
        self,
        x_TD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        slots_T: torch.Tensor,
        sequences: SequenceBatch,
    ) -> torch.Tensor:
        """Run the residual stream [T, D], float32, through all layers, in its place.

        Args:
            rotary: cosine and sine of each token's position, [T, H / 2] float32.

        Extra memory: T (D + max(2 q + 2 kv, the largest block)) float32, and the linear kernels'.
        Errors: ValueError for a batch whose slots, lengths or blocks do not fit the cache.
        """
        count = x_TD.shape[0]
        rows, workspace = torch.arange(count), _empty(self._stack.workspace(count))
        inputs = self._inputs(x_TD, rows, rotary, slots_T, sequences)
        self._stack.run(*inputs, workspace.data_ptr())
        return x_TD

    def _inputs(
        self,
        x_TD: torch.Tensor,
        rows_T: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        slots_T: torch.Tensor,
        sequences: SequenceBatch,
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Addresses and sizes of what runs, checked; valid as long as the tensors are held."""
        count, shape = x_TD.shape[0], self._shape
        _check_float(x_TD, (count, shape.hidden_size), "x")
        for table in rotary:
            _check_float(table, (count, shape.head_dim // 2), "a rotary table")
        check_indices(slots_T, torch.int64, [count], "slots")
        cos_TR, sin_TR = rotary
        tables = (rows_T.data_ptr(), cos_TR.data_ptr(), sin_TR.data_ptr(), slots_T.data_ptr())
        return (
            (x_TD.data_ptr(), count, *tables),
            (
                sequences.block_tables.data_ptr(),
                sequences.block_tables.shape[1],
                sequences.query_starts.data_ptr(),
                sequences.context_lens.data_ptr(),
                sequences.context_lens.shape[0],
            ),
        )

    def _add(self, layer: StackLayer, cache: PagedKv) -> None:
        shape = self._shape
        size, q_size = shape.hidden_size, shape.num_heads * shape.head_dim
        widths = (size, shape.head_dim, shape.head_dim, size)
        for norm, width in zip(layer.norms, widths, strict=True):
            if norm is not None:
                check_vector(norm, width, "norm")
        if (layer.norms[1] is None) != (layer.norms[2] is None):
            raise ValueError("q and k are both normed, or neither is")
        if (cache.k.shape[1], cache.k.shape[3]) != (shape.num_kv_heads, shape.head_dim):
            raise ValueError(f"a cache {list(cache.k.shape)} is not of these heads")
        kv_size = shape.num_kv_heads * shape.head_dim
        sizes = ((q_size, size), (kv_size, size), (kv_size, size), (size, q_size))
        self._stack.add_layer(
            tuple(0 if norm is None else norm.data_ptr() for norm in layer.norms),
            tuple(m.address(*one) for m, one in zip(layer.attention, sizes, strict=True)),
            [_block_addresses(block, size) for block in layer.blocks],
            layer.window,
            cache.addresses,
        )


class NativePrediction(NativeStack):
    """A prediction layer in one call, its norms and projection too.

    Args:
        pairing: what stands around the one layer.
    """

    def __init__(
        self, shape: StackShape, layer: StackLayer, kv_cache: PagedKv, pairing: StackPairing
    ) -> None:
        super().__init__(shape, [layer], [kv_cache])
        self._pairing = pairing
        self._around = pairing.addresses(shape.hidden_size)

    def predict(
        self,
        hidden_TD: torch.Tensor,
        token_TD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        slots_T: torch.Tensor,
        sequences: SequenceBatch,
    ) -> torch.Tensor:
        """Rows of a model's residual stream and the embeddings of the tokens that follow, both
        [T, D] float32, to what the head takes.

        Extra memory: as ``run``, and 3 T D float32. Errors: as ``run``.
        """
        count, size = hidden_TD.shape
        for x_TD, name in ((hidden_TD, "hidden"), (token_TD, "token")):
            _check_float(x_TD, (count, self._shape.hidden_size), name)
        rows, out_TD = torch.arange(count), torch.empty_like(hidden_TD)
        workspace = _empty(self._stack.workspace(count) + 2 * count * size)
        inputs = self._inputs(out_TD, rows, rotary, slots_T, sequences)
        pair = (hidden_TD.data_ptr(), token_TD.data_ptr())
        self._stack.predict(*inputs, workspace.data_ptr(), self._around, pair)
        return out_TD


def _empty(num_values: int) -> torch.Tensor:
    return torch.empty(num_values, dtype=torch.float32, device="cpu")


def _block_addresses(
    block: tuple[StackMatrix, StackMatrix, StackMatrix], size: int
) -> tuple[tuple[int, int, int, int, int], ...]:
    gate, up, down = block
    if gate.bias is not None or up.bias is not None:
        raise ValueError("gate and up have no bias here")
    inner = gate.weight.out_features
    return gate.address(inner, size), up.address(inner, size), down.address(size, inner)


def _check_float(x: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {x.dtype}")
    if tuple(x.shape) != shape or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"{name} must be a contiguous {list(shape)}, got {list(x.shape)}")
