"""The table of tensors: its parts make up the whole model, however a packing cuts it."""

from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing
from thinslice.plan.tensors import Role, Room, Tensor, tensors_of


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    num_kv_heads = draw(st.integers(1, 3))
    return ModelShape(
        architecture="LlamaForCausalLM",
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=32 * draw(st.integers(1, 4)),
        intermediate_size=32 * draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=num_kv_heads,
        head_dim=16 * draw(st.integers(1, 3)),
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=64,
        attention_bias=draw(st.booleans()),
        attention_out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
    )


packings = st.builds(
    Packing,
    st.sampled_from((PackedFormat.INT4, PackedFormat.INT8)),
    st.just(PackedFormat.INT8),
    st.sampled_from((64, 128, 192)),
)


def check_parts(packed: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
    """Each place of each tensor of the unpacked model is in exactly one part."""
    parts = defaultdict(list)
    for tensor in packed:
        (first, last), (left, right) = tensor.origin.rows, tensor.origin.columns
        sizes = (last - first, right - left)
        assert tensor.shape == (sizes if tensor.is_matrix else sizes[:1])
        parts[tensor.origin.name].append((first, last, left, right))
    assert {*parts} == {tensor.name for tensor in whole}
    for tensor in whole:
        rows, columns = tensor.origin.rows[1], tensor.origin.columns[1]
        places = sum(
            (last - first) * (right - left) for first, last, left, right in parts[tensor.name]
        )
        assert places == rows * columns == tensor.numel
        for first, last, left, right in parts[tensor.name]:
            assert 0 <= first < last <= rows
            assert 0 <= left < right <= columns
        starts = {(first, left) for first, _, left, _ in parts[tensor.name]}
        assert len(starts) == len(parts[tensor.name])


@given(shapes(), packings)
def test_the_parts_of_a_packed_model_are_the_whole_model(
    shape: ModelShape, packing: Packing
) -> None:
    packed = tensors_of(shape, packing)
    assert len({tensor.name for tensor in packed}) == len(packed)
    check_parts(packed, tensors_of(shape))
    if shape.intermediate_size > packing.ffn_block:
        last = max(i for i, tensor in enumerate(packed) if tensor.role is Role.DOWN)
        with pytest.raises(AssertionError):  # planted: a block is left out
            check_parts([*packed[:last], *packed[last + 1 :]], tensors_of(shape))


@given(shapes(), packings)
def test_roles_and_rooms(shape: ModelShape, packing: Packing) -> None:
    tensors = tensors_of(shape, packing)
    heads = [tensor for tensor in tensors if tensor.role is Role.HEAD]
    tables = [tensor for tensor in tensors if tensor.role is Role.EMBEDDING]
    assert len(heads) == 1
    assert len(tables) == (0 if shape.tie_word_embeddings else 1)
    assert heads[0].format_in(packing) is packing.head
    for tensor in tensors:
        is_by_heads = tensor.role in (Role.QUERY, Role.KEY, Role.VALUE)
        assert tensor.grain == (shape.head_dim if is_by_heads else 1)
        assert tensor.shape[0] % tensor.grain == 0
        if tensor.role in (Role.EMBEDDING, Role.NORM, Role.BIAS):
            assert tensor.format_in(packing) is None
        elif tensor.room is Room.LAYERS:
            assert tensor.format_in(packing) is packing.weights
