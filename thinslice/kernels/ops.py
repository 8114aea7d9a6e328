"""The operators that a dense decoder is written in, and the weights they take.

Each implementation is one ``Ops``: a table of functions, and what is made of them. Values flow: an
operator returns its result. ``apply_rotary`` and ``add_linear`` may compute it in the place of
their first argument, which is then not used again; ``swiglu_`` and ``rms_norm_`` must. Letters in
names are the dimensions: T packed query tokens, D hidden size, F inner features, N query heads, K
KV heads, H head dim, R = H / 2.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Array
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.plan.model_shape import ModelShape

# Rows of a matrix: numbers, or packed.
Rows = Array | PackedWeight
# Cosine and sine of each token's position, [T, R] each.
RotaryTables = tuple[Array, Array]


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """A matrix [out, in] and its bias [out]: ``x @ matrix.T + bias``.

    Attributes:
        slices: gives the first and last row and the rows of each slice, in order; rows that are
            streamed are valid until the next are asked for.
        whole: the matrix, where it lies in memory in one piece.
    """

    out_features: int
    slices: Callable[[], Iterable[tuple[int, int, Rows]]]
    bias: Array | None = None
    whole: Rows | None = None

    @classmethod
    def resident(cls, whole: Rows, bias: Array | None = None) -> "Linear":
        """A matrix that lies in memory in one piece."""
        count = whole.out_features if isinstance(whole, PackedWeight) else whole.shape[0]
        return cls(count, lambda: ((0, count, whole),), bias, whole)

    def bias_of(self, start: int, stop: int) -> Array | None:
        """The bias of some rows."""
        return None if self.bias is None else self.bias[start:stop]


@dataclass(frozen=True, eq=False, slots=True)
class FeedForwardWeights:
    """The matrices of a SwiGLU feed-forward: of all of a layer's inner features, or of a block."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, eq=False, slots=True)
class LayerWeights:
    """What one decoder layer computes with.

    Attributes:
        query_norm, key_norm: both, or neither.
        blocks: of the feed-forward, whose outputs are added up.
    """

    input_norm: Array
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Array | None
    key_norm: Array | None
    post_attention_norm: Array
    blocks: tuple[FeedForwardWeights, ...]


@dataclass(frozen=True, eq=False, slots=True)
class PredictionWeights:
    """What a multi-token-prediction layer computes with.

    Attributes:
        pairing: [D, 2 D], of the normed hidden state and the normed token side by side.
    """

    hidden_norm: Array
    token_norm: Array
    pairing: Linear
    layer: LayerWeights
    final_norm: Array


class Fused(Protocol):
    """Layers as one call, with their KV caches."""

    def serves(self, kv_caches: Sequence[PagedKv], /) -> bool:
        """Whether these are the caches that it was made with."""

    def run(
        self, x_TD: Array, rotary: RotaryTables, slots_T: Array, sequences: SequenceBatch, /
    ) -> Array:
        """The residual stream behind the layers."""


class FusedPrediction(Protocol):
    """A prediction layer as one call, with its KV cache."""

    def predict(
        self,
        hidden_TD: Array,
        token_TD: Array,
        rotary: RotaryTables,
        slots_T: Array,
        sequences: SequenceBatch,
        /,
    ) -> Array:
        """What the head takes."""


class Product(Protocol):
    """``x @ rows.T + bias + residual``; ``out`` may be ``residual``."""

    def __call__(
        self,
        x_TD: Array,
        rows: Rows,
        bias: Array | None = None,
        residual: Array | None = None,
        out: Array | None = None,
    ) -> Array: ...


class Attend(Protocol):
    """Write K and V into the cache, then causal attention over it; see torch_ops.attend."""

    def __call__(
        self,
        qkv: tuple[Array, Array, Array],
        cache: PagedKv,
        slots_T: Array,
        sequences: SequenceBatch,
        window: int | None = None,
    ) -> Array: ...


@dataclass(frozen=True)
class Ops:
    """One implementation of the operators.

    Attributes:
        placed: an array of the host where the operators take theirs.
        to_host: numbers of theirs in float32, on the host.
        empty: room for numbers like those of an array, of some shape.
        side_by_side: columns of several arrays, one array after the other.
        rms_norm: root-mean-square norm over the last dimension, by a weight and an epsilon.
        rms_norm_: the same of rows, in their place.
        apply_rotary: rotary embedding of [T, N, H] by two tables.
        product: of rows and some rows of a matrix.
        swiglu_: ``silu(gate) * up``, in the place of ``gate``.
        attend: attention over the paged cache.
        fuse, fuse_prediction: make one call of layers, or of a prediction layer, where they hold
            nothing that the call does not know; None where that cannot be.
    """

    placed: Callable[[NDArray[np.generic]], Array]
    to_host: Callable[[Array], NDArray[np.float32]]
    empty: Callable[[Array, tuple[int, ...]], Array]
    side_by_side: Callable[[Sequence[Array]], Array]
    rms_norm: Callable[[Array, Array, float], Array]
    rms_norm_: Callable[[Array, Array, float], Array]
    apply_rotary: Callable[[Array, Array, Array], Array]
    product: Product
    swiglu_: Callable[[Array, Array], Array]
    attend: Attend
    fuse: Callable[[ModelShape, Sequence[LayerWeights], Sequence[PagedKv]], Fused | None] | None = (
        None
    )
    fuse_prediction: (
        Callable[[ModelShape, PredictionWeights, PagedKv], FusedPrediction | None] | None
    ) = None

    def linear(self, x_TD: Array, linear: Linear) -> Array:
        """``x @ matrix.T + bias``. Extra memory: the output."""
        if linear.whole is not None:
            return self.product(x_TD, linear.whole, linear.bias)
        out = self.empty(x_TD, (len(x_TD), linear.out_features))
        for start, stop, rows in linear.slices():
            self.product(x_TD, rows, linear.bias_of(start, stop), None, out[:, start:stop])
        return out

    def add_linear(self, residual_TD: Array, x_TD: Array, linear: Linear) -> Array:
        """``residual + linear(x)``."""
        for start, stop, rows in linear.slices():
            part = residual_TD[:, start:stop]
            self.product(x_TD, rows, linear.bias_of(start, stop), part, part)
        return residual_TD

    def swiglu_linear(self, gate_TF: Array, x_TD: Array, linear: Linear) -> Array:
        """``silu(gate) * linear(x)``. Extra memory: the output of one slice."""
        for start, stop, rows in linear.slices():
            up = self.product(x_TD, rows, linear.bias_of(start, stop))
            self.swiglu_(gate_TF[:, start:stop], up)
        return gate_TF

    def linear_tiles(
        self, x_TD: Array, linear: Linear, most_elements: int
    ) -> Iterator[tuple[int, int, Array]]:
        """``linear(x)`` in tiles of at most so many elements, or of one row of a slice.

        Gives of each its first row and its first column, and the tile; a row's columns in order.
        """
        for start, stop, rows in linear.slices():
            count = max(most_elements // (stop - start), 1)
            bias = linear.bias_of(start, stop)
            for first in range(0, len(x_TD), count):
                yield first, start, self.product(x_TD[first : first + count], rows, bias)
