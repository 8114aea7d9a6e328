"""The slices that weights are worked on in, in the order in which a forward pass uses them.

A slice is a range of rows of one matrix. Vectors (norms and biases) are not sliced: they are small
and stay resident. The embedding table is read by rows and is no part of a sweep, unless it is the
head as well.
"""

from dataclasses import dataclass

from thinslice.plan.model_shape import ModelShape


@dataclass(frozen=True)
class WeightSlice:
    """Rows ``start`` to ``stop`` of a matrix with ``columns`` columns."""

    name: str
    start: int
    stop: int
    columns: int

    @property
    def numel(self) -> int:
        """Weights in the slice."""
        return (self.stop - self.start) * self.columns


def head_name(shape: ModelShape) -> str:
    """The matrix that makes logits."""
    return "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"


def sweep_slices(shape: ModelShape, max_weights: int) -> tuple[WeightSlice, ...]:
    """All slices of one sweep, each of at most ``max_weights`` weights (but at least one step).

    A step is a row; for q, k and v it is a head, whose rows a GGUF may keep in another order.
    """
    names = [
        (f"model.layers.{layer_idx}.{matrix.name}", matrix)
        for layer_idx in range(shape.num_hidden_layers)
        for matrix in _layer_matrices(shape)
    ]
    names.append((head_name(shape), _head(shape)))
    return tuple(
        WeightSlice(name, start, stop, matrix.columns)
        for name, matrix in names
        for start, stop in matrix.ranges(max_weights)
    )


def sweep_numels(shape: ModelShape, max_weights: int) -> list[int]:
    """Weights in each slice of ``sweep_slices``, without making them: a plan asks often."""
    layer = [numel for matrix in _layer_matrices(shape) for numel in matrix.numels(max_weights)]
    return layer * shape.num_hidden_layers + _head(shape).numels(max_weights)


def resident_vectors(shape: ModelShape) -> int:
    """Weights in norms and biases, which are never streamed."""
    per_layer = 2 * shape.hidden_size
    if shape.attention_bias:
        per_layer += shape.q_size + 2 * shape.kv_size
    if shape.attention_out_bias:
        per_layer += shape.hidden_size
    if shape.mlp_bias:
        per_layer += 2 * shape.intermediate_size + shape.hidden_size
    if shape.use_qk_norm:
        per_layer += 2 * shape.head_dim
    return shape.num_hidden_layers * per_layer + shape.hidden_size


@dataclass(frozen=True)
class _Matrix:
    """A matrix and how many of its rows stay together."""

    name: str
    rows: int
    columns: int
    step: int = 1

    def ranges(self, max_weights: int) -> list[tuple[int, int]]:
        rows = max(max_weights // (self.columns * self.step), 1) * self.step
        return [(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    def numels(self, max_weights: int) -> list[int]:
        return [(stop - start) * self.columns for start, stop in self.ranges(max_weights)]


def _layer_matrices(shape: ModelShape) -> tuple[_Matrix, ...]:
    """One layer's matrices in the order of use."""
    size, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    return (
        _Matrix("self_attn.q_proj.weight", shape.q_size, size, head),
        _Matrix("self_attn.k_proj.weight", shape.kv_size, size, head),
        _Matrix("self_attn.v_proj.weight", shape.kv_size, size, head),
        _Matrix("self_attn.o_proj.weight", size, shape.q_size),
        _Matrix("mlp.gate_proj.weight", inner, size),
        _Matrix("mlp.up_proj.weight", inner, size),
        _Matrix("mlp.down_proj.weight", size, inner),
    )


def _head(shape: ModelShape) -> _Matrix:
    return _Matrix(head_name(shape), shape.vocab_size, shape.hidden_size)
