"""The border to all layers of a decoder in one call, where every matrix lies in memory.

The same kernels in the same order as one operator after the other, and so the same bits; what it
saves is Python between them: of a model of 135M parameters a third of the time of a token.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Floats, empty
from thinslice.kernels.native import (
    Matrix,
    check_array,
    library,
    size_of,
    weight_address,
)
from thinslice.kernels.ops import FeedForwardWeights, LayerWeights, Linear, PredictionWeights
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.plan.model_shape import ModelShape

# What crosses the border of a matrix; see native.weight_address.
_Address = tuple[int, int, int, int, int]


def fuse(
    shape: ModelShape, layers: Sequence[LayerWeights], kv_caches: Sequence[PagedKv]
) -> "NativeStack | None":
    """Layers as one call, or None: a matrix is streamed, packed and numbers are multiplied with the
    same rows, or gate or up has a bias."""
    return NativeStack(shape, layers, kv_caches) if all(map(_is_known, layers)) else None


def fuse_prediction(
    shape: ModelShape, prediction: PredictionWeights, kv_cache: PagedKv
) -> "NativePrediction | None":
    """A prediction layer as one call; None as for ``fuse``."""
    if not _is_known(prediction.layer) or prediction.pairing.whole is None:
        return None
    return NativePrediction(shape, prediction, kv_cache)


def _is_known(layer: LayerWeights) -> bool:
    together = [(layer.query, layer.key, layer.value), (layer.output,)]
    for block in layer.blocks:
        if block.gate.bias is not None or block.up.bias is not None:
            return False
        together += [(block.gate, block.up), (block.down,)]
    return all(map(_are_alike, together))


def _are_alike(matrices: tuple[Linear, ...]) -> bool:
    """Whether matrices lie in memory, and are all packed or all numbers of one type."""
    kinds = {_kind_of(one.whole) for one in matrices}
    return len(kinds) == 1 and None not in kinds


def _kind_of(matrix: Matrix | None) -> object:
    return PackedWeight if isinstance(matrix, PackedWeight) else getattr(matrix, "dtype", None)


class NativeStack:
    """The first layers of a model with their KV caches, checked once.

    Args:
        layers: of matrices that lie in memory whole; gate and up have no bias. Norms and
            biases are float32.
    """

    def __init__(
        self, shape: ModelShape, layers: Sequence[LayerWeights], kv_caches: Sequence[PagedKv]
    ) -> None:
        # The addresses inside hold only as long as these do.
        self._layers, self._caches = tuple(layers), tuple(kv_caches)
        self._shape = shape
        self._stack = library().Stack(
            shape.hidden_size,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
            shape.rms_norm_eps,
            shape.head_dim**-0.5,
        )
        for idx, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            self._add(layer, cache, self._window_of(idx))

    def _window_of(self, layer_idx: int) -> int:
        """Positions that a token sees; 0 for all."""
        return self._shape.window_of(layer_idx) or 0

    def serves(self, kv_caches: Sequence[PagedKv]) -> bool:
        """Whether these are the caches it was made with."""
        return len(kv_caches) == len(self._caches) and all(
            one is other for one, other in zip(kv_caches, self._caches, strict=True)
        )

    def run(
        self,
        x_TD: Floats,
        rotary: tuple[Floats, Floats],
        slots_T: NDArray[np.int64],
        sequences: SequenceBatch,
    ) -> Floats:
        """Run the residual stream [T, D], float32, through all layers, in its place.

        Args:
            rotary: cosine and sine of each token's position, [T, H / 2] float32.

        Extra memory: T (D + max(2 q + 2 kv, the largest block)) float32, and the linear kernels'.
        Errors: ValueError for a batch whose slots, lengths or blocks do not fit the cache.
        """
        count = len(x_TD)
        rows, workspace = np.arange(count), _workspace(self._stack.workspace(count))
        inputs = self._inputs(x_TD, rows, rotary, slots_T, sequences)
        self._stack.run(*inputs, workspace.ctypes.data)
        return x_TD

    def _inputs(
        self,
        x_TD: Floats,
        rows_T: NDArray[np.int64],
        rotary: tuple[Floats, Floats],
        slots_T: NDArray[np.int64],
        sequences: SequenceBatch,
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Addresses and sizes of what runs, checked; valid as long as the arrays are held."""
        count, shape = len(x_TD), self._shape
        check_array(x_TD, np.float32, (count, shape.hidden_size), "x")
        for table in rotary:
            check_array(table, np.float32, (count, shape.head_dim // 2), "a rotary table")
        check_array(slots_T, np.int64, (count,), "slots")
        cos_TR, sin_TR = rotary
        tables = (rows_T.ctypes.data, cos_TR.ctypes.data, sin_TR.ctypes.data, slots_T.ctypes.data)
        return (x_TD.ctypes.data, count, *tables), sequences.addresses

    def _add(self, layer: LayerWeights, cache: PagedKv, window: int) -> None:
        shape = self._shape
        size, head_dim = shape.hidden_size, shape.head_dim
        q_size, kv_size = shape.q_size, shape.kv_size
        norms = (
            _norm_address(layer.input_norm, size),
            _norm_address(layer.query_norm, head_dim),
            _norm_address(layer.key_norm, head_dim),
            _norm_address(layer.post_attention_norm, size),
        )
        if (layer.query_norm is None) != (layer.key_norm is None):
            raise ValueError("q and k are both normed, or neither is")
        if (cache.k.shape[1], cache.k.shape[3]) != (shape.num_key_value_heads, head_dim):
            raise ValueError(f"a cache {list(cache.k.shape)} is not of these heads")
        attention = (
            _address(layer.query, q_size, size),
            _address(layer.key, kv_size, size),
            _address(layer.value, kv_size, size),
            _address(layer.output, size, q_size),
        )
        blocks = [_block_addresses(block, size) for block in layer.blocks]
        self._stack.add_layer(norms, attention, blocks, window, cache.addresses)


class NativePrediction(NativeStack):
    """A prediction layer in one call, its norms and projection too."""

    def __init__(self, shape: ModelShape, prediction: PredictionWeights, kv_cache: PagedKv) -> None:
        super().__init__(shape, [prediction.layer], [kv_cache])
        size = shape.hidden_size
        self._prediction = prediction
        self._around = (
            _norm_address(prediction.hidden_norm, size),
            _norm_address(prediction.token_norm, size),
            _address(prediction.pairing, size, 2 * size),
            _norm_address(prediction.final_norm, size),
        )

    def _window_of(self, layer_idx: int) -> int:
        return 0

    def predict(
        self,
        hidden_TD: Floats,
        token_TD: Floats,
        rotary: tuple[Floats, Floats],
        slots_T: NDArray[np.int64],
        sequences: SequenceBatch,
    ) -> Floats:
        """Rows of a model's residual stream and the embeddings of the tokens that follow, both
        [T, D] float32, to what the head takes.

        Extra memory: as ``run``, and 3 T D float32. Errors: as ``run``.
        """
        count, size = hidden_TD.shape
        for x_TD, name in ((hidden_TD, "hidden"), (token_TD, "token")):
            check_array(x_TD, np.float32, (count, self._shape.hidden_size), name)
        rows, out_TD = np.arange(count), empty(hidden_TD.shape, np.float32)
        workspace = _workspace(self._stack.workspace(count) + 2 * count * size)
        inputs = self._inputs(out_TD, rows, rotary, slots_T, sequences)
        pair = (hidden_TD.ctypes.data, token_TD.ctypes.data)
        self._stack.predict(*inputs, workspace.ctypes.data, self._around, pair)
        return out_TD


def _workspace(num_values: int) -> Floats:
    return empty((num_values,), np.float32)


def _norm_address(norm: Floats | None, size: int) -> int:
    if norm is None:
        return 0
    check_array(norm, np.float32, (size,), "norm")
    return norm.ctypes.data


def _address(linear: Linear, out_features: int, in_features: int) -> _Address:
    """What crosses the border of a matrix, which must be of this size."""
    weight = linear.whole
    assert weight is not None, "a matrix that is streamed"
    found = size_of(weight)
    if found != (out_features, in_features):
        raise ValueError(f"expected a matrix {(out_features, in_features)}, got {found}")
    return weight_address(weight, linear.bias)


def _block_addresses(block: FeedForwardWeights, size: int) -> tuple[_Address, _Address, _Address]:
    if block.gate.bias is not None or block.up.bias is not None:
        raise ValueError("gate and up have no bias here")
    inner = block.gate.out_features
    return (
        _address(block.gate, inner, size),
        _address(block.up, inner, size),
        _address(block.down, size, inner),
    )
