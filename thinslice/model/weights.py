"""The weights of a model as the decoder takes them, wherever they lie."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from thinslice.kernels.arrays import Array
from thinslice.kernels.ops import (
    FeedForwardWeights,
    Fused,
    FusedPrediction,
    LayerWeights,
    Linear,
    Ops,
    PredictionWeights,
)
from thinslice.kernels.paged_kv import PagedKv
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packing import Packing
from thinslice.plan.tensors import EMBEDDING, FINAL_NORM, HEAD, Room, Tensor, tensors_of


@dataclass(frozen=True)
class ReadStats:
    """What a source has read from disk since it was opened.

    Attributes:
        num_bytes: bytes read, those that only align a request included.
        wait_s: seconds in which the model waited for slices.
        io_s: seconds in which at least one request was in flight.
    """

    num_bytes: int = 0
    wait_s: float = 0.0
    io_s: float = 0.0


class WeightSource(Protocol):
    """Where the weights of a model lie. Its matrices are walked in the order of use."""

    @property
    def layer_rows(self) -> int | None:
        """The most rows that a layer takes at a time; None takes all."""

    @property
    def streams(self) -> bool:
        """Whether slices are read or copied in at each use."""

    def vector(self, name: str) -> Array:
        """A norm or a bias."""

    def linear(self, name: str, bias: Array | None) -> Linear:
        """A matrix by its name in the checkpoint, with its bias."""

    def embed(self, token_ids_T: Array) -> Array:
        """Rows of the embedding table."""

    def hold(self) -> AbstractContextManager[None]:
        """In this context matrices may be walked several times."""

    def begin_sweep(self) -> None:
        """Go to the first slice, also after a sweep that was broken off."""

    def read_stats(self) -> ReadStats:
        """What was read since the source was opened."""

    def close(self) -> None:
        """Stop reading and close the files; a second time nothing happens."""


class Weights:
    """Weights by their place in the model.

    Args:
        packing: of a packed checkpoint, whose feed-forwards are cut into blocks.
        has_predictions: the multi-token-prediction layers are there.

    Attributes:
        is_whole: False where somebody was interrupted who replaced them.
        predictions: the multi-token-prediction layers.
        fused, fused_predictions: the layers, and each prediction layer, as one call; None where
            they cannot be.
    """

    def __init__(
        self,
        shape: ModelShape,
        source: WeightSource,
        ops: Ops,
        packing: Packing | None = None,
        has_predictions: bool = False,
    ) -> None:
        self.shape = shape
        self.source = source
        self.ops = ops
        self.is_whole = True
        layers: dict[tuple[Room, int], list[Tensor]] = {}
        for tensor in tensors_of(shape, packing):
            layers.setdefault((tensor.room, tensor.index), []).append(tensor)
        self.layers = tuple(
            _Layer(tensors, source).weights()
            for (room, _), tensors in layers.items()
            if room is Room.LAYERS
        )
        self.predictions = tuple(
            _Layer(tensors, source).prediction_weights()
            for (room, _), tensors in layers.items()
            if room is Room.PREDICTION and has_predictions
        )
        self.norm = source.vector(FINAL_NORM)
        self.head = source.linear(EMBEDDING if shape.tie_word_embeddings else HEAD, None)
        self.fused: Fused | None = None
        self.fused_predictions: list[FusedPrediction | None] = [None for _ in self.predictions]

    @property
    def layer_rows(self) -> int | None:
        """The most rows that a layer takes at a time; None takes all."""
        return self.source.layer_rows

    def embed(self, token_ids_T: Array) -> Array:
        """Rows of the embedding table, [T, D]."""
        return self.source.embed(token_ids_T)

    @contextmanager
    def layer(self, idx: int, is_used_again: bool = False) -> Iterator[LayerWeights]:
        """One layer's weights, for one use or several within the context."""
        with self.source.hold() if is_used_again else nullcontext():
            yield self.layers[idx]

    def fuse(self, kv_caches: Sequence[PagedKv], mtp_caches: Sequence[PagedKv] = ()) -> None:
        """Make one call of the layers with these caches, where the operators have one for them."""
        if self.ops.fuse is not None:
            self.fused = self.ops.fuse(self.shape, self.layers, kv_caches)
        if self.ops.fuse_prediction is not None:
            self.fused_predictions = [
                self.ops.fuse_prediction(self.shape, prediction, cache)
                for prediction, cache in zip(self.predictions, mtp_caches, strict=True)
            ]


class _Layer:
    """The tensors of one layer, by their names within it."""

    def __init__(self, tensors: Sequence[Tensor], source: WeightSource) -> None:
        self._names = {tensor.name_in_layer: tensor.name for tensor in tensors}
        self._source = source

    def weights(self) -> LayerWeights:
        gate = ".gate_proj.weight"
        blocks = [name.removesuffix(gate) for name in self._names if name.endswith(gate)]
        return LayerWeights(
            input_norm=self._norm("input_layernorm"),
            query=self._linear("self_attn.q_proj"),
            key=self._linear("self_attn.k_proj"),
            value=self._linear("self_attn.v_proj"),
            output=self._linear("self_attn.o_proj"),
            query_norm=self._vector("self_attn.q_norm.weight"),
            key_norm=self._vector("self_attn.k_norm.weight"),
            post_attention_norm=self._norm("post_attention_layernorm"),
            blocks=tuple(
                FeedForwardWeights(
                    self._linear(f"{block}.gate_proj"),
                    self._linear(f"{block}.up_proj"),
                    self._linear(f"{block}.down_proj"),
                )
                for block in blocks
            ),
        )

    def prediction_weights(self) -> PredictionWeights:
        return PredictionWeights(
            hidden_norm=self._norm("hidden_layernorm"),
            token_norm=self._norm("token_layernorm"),
            pairing=self._linear("input_proj"),
            layer=self.weights(),
            final_norm=self._norm("final_layernorm"),
        )

    def _norm(self, name: str) -> Array:
        return self._source.vector(self._names[f"{name}.weight"])

    def _vector(self, name: str) -> Array | None:
        return self._source.vector(self._names[name]) if name in self._names else None

    def _linear(self, name: str) -> Linear:
        return self._source.linear(self._names[f"{name}.weight"], self._vector(f"{name}.bias"))
