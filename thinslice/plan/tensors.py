"""Every tensor of a model, described once: names, layout, bytes, packing and counts derive from it.

Arithmetic only; what a checkpoint really holds is checked against this in checkpoint/names.py.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


class Role(StrEnum):
    """What a matrix does, or that a tensor is a vector."""

    EMBEDDING = "embedding"
    HEAD = "head"  # where the two are tied, the embedding table has this one
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    PAIRING = "pairing"  # of the last hidden state and the next token, in a prediction layer
    NORM = "norm"
    BIAS = "bias"


class Room(StrEnum):
    """The part of the model that a tensor belongs to."""

    TABLES = "tables"  # the embedding, the head and the norm before it
    LAYERS = "layers"
    PREDICTION = "prediction"


@dataclass(frozen=True, slots=True)
class Origin:
    """The part of a tensor of an unpacked checkpoint that a tensor is: all of it, or a block of a
    feed-forward.

    Attributes:
        rows, columns: first and last; the columns of a vector are 0 to 1.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, packed or not.

    Attributes:
        name: in the checkpoint.
        shape: rows first; a vector has one dimension.
        index: of its layer within its room; 0 for tables.
        grain: rows that cannot be parted: those of a head stay together in q, k and v, for a GGUF
            may keep them in another order.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    room: Room
    index: int
    origin: Origin
    grain: int = 1

    @property
    def name_in_layer(self) -> str:
        """The name without its layer's; the whole of it for tables."""
        return self.name.removeprefix(_prefix(self.room, self.index))

    @property
    def is_matrix(self) -> bool:
        """Whether it can be sliced, packed and streamed; vectors stay whole and resident."""
        return len(self.shape) == 2

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    def format_in(self, packing: Packing) -> PackedFormat | None:
        """What a packing stores it in; None for a vector, or for a table that is read by rows."""
        if not self.is_matrix or self.role is Role.EMBEDDING:
            return None
        return packing.weights if self.room is Room.LAYERS else packing.head


@lru_cache(maxsize=8)
def tensors_of(shape: ModelShape, packing: Packing | None = None) -> tuple[Tensor, ...]:
    """Every tensor of a model: embedding, layers, norm, head, prediction.

    Matrices come in the order of use, the norms of a layer before them. A tied head is the
    embedding and is not listed again.

    Args:
        packing: of a packed checkpoint, whose feed-forwards are cut into blocks.
    """
    size, vocab_size = shape.hidden_size, shape.vocab_size
    tables = _Tensors(Room.TABLES)
    is_head = shape.tie_word_embeddings
    tables.add(EMBEDDING, (vocab_size, size), Role.HEAD if is_head else Role.EMBEDDING)
    layers: list[Tensor] = []
    for idx in range(shape.num_hidden_layers):
        layer = _Tensors(Room.LAYERS, idx)
        _list_layer(layer, shape, packing)
        layers += layer.found
    ends = _Tensors(Room.TABLES)
    ends.add(FINAL_NORM, (size,), Role.NORM)
    if not is_head:
        ends.add(HEAD, (vocab_size, size), Role.HEAD)
    predictions: list[Tensor] = []
    for idx in range(shape.num_nextn_predict_layers):
        layer = _Tensors(Room.PREDICTION, idx)
        layer.add("token_layernorm.weight", (size,), Role.NORM)
        layer.add("hidden_layernorm.weight", (size,), Role.NORM)
        layer.add("input_proj.weight", (size, 2 * size), Role.PAIRING)
        _list_layer(layer, shape, packing)
        layer.add("final_layernorm.weight", (size,), Role.NORM)
        predictions += layer.found
    return (*tables.found, *layers, *ends.found, *predictions)


def _prefix(room: Room, index: int) -> str:
    """What the names of a layer's tensors begin with."""
    if room is Room.TABLES:
        return ""
    return f"model.{'layers' if room is Room.LAYERS else 'mtp_layers'}.{index}."


class _Tensors:
    """Tensors of one layer, or of the tables, listed one by one."""

    def __init__(self, room: Room, index: int = 0) -> None:
        self._room, self._index, self._prefix = room, index, _prefix(room, index)
        self.found: list[Tensor] = []

    def add(self, name: str, shape: tuple[int, ...], role: Role, grain: int = 1) -> None:
        """List a tensor that an unpacked checkpoint has too."""
        columns = shape[1] if len(shape) == 2 else 1
        name = self._prefix + name
        origin = Origin(name, (0, shape[0]), (0, columns))
        self.found.append(Tensor(name, shape, role, self._room, self._index, origin, grain))

    def add_part(self, name: str, role: Role, origin: Origin) -> None:
        """List a block of a tensor; both are named without the layer."""
        (first, last), (left, right) = origin.rows, origin.columns
        shape = (last - first,) if role is Role.BIAS else (last - first, right - left)
        origin = replace(origin, name=self._prefix + origin.name)
        name = self._prefix + name
        self.found.append(Tensor(name, shape, role, self._room, self._index, origin))


def _list_layer(layer: _Tensors, shape: ModelShape, packing: Packing | None) -> None:
    """A decoder layer: its norms, attention, and feed-forward."""
    size, head_dim = shape.hidden_size, shape.head_dim
    layer.add("input_layernorm.weight", (size,), Role.NORM)
    layer.add("post_attention_layernorm.weight", (size,), Role.NORM)
    if shape.use_qk_norm:
        layer.add("self_attn.q_norm.weight", (head_dim,), Role.NORM)
        layer.add("self_attn.k_norm.weight", (head_dim,), Role.NORM)
    for name, rows, role in (
        ("q_proj", shape.q_size, Role.QUERY),
        ("k_proj", shape.kv_size, Role.KEY),
        ("v_proj", shape.kv_size, Role.VALUE),
    ):
        layer.add(f"self_attn.{name}.weight", (rows, size), role, grain=head_dim)
        if shape.attention_bias:
            layer.add(f"self_attn.{name}.bias", (rows,), Role.BIAS)
    layer.add("self_attn.o_proj.weight", (size, shape.q_size), Role.OUTPUT)
    if shape.attention_out_bias:
        layer.add("self_attn.o_proj.bias", (size,), Role.BIAS)
    inner = shape.intermediate_size
    blocks = [("mlp", (0, inner))]
    if packing is not None:
        blocks = [(f"mlp.blocks.{idx}", block) for idx, block in enumerate(packing.blocks(inner))]
    for prefix, block in blocks:
        _list_feed_forward(layer, shape, prefix, block)


def _list_feed_forward(
    layer: _Tensors, shape: ModelShape, prefix: str, block: tuple[int, int]
) -> None:
    """One block of features of a feed-forward, or all: rows of gate and up, columns of down.

    Blocks are added up, so the bias of down goes with the first alone.
    """
    every = (0, shape.hidden_size)
    for name, role in (("gate_proj", Role.GATE), ("up_proj", Role.UP)):
        layer.add_part(f"{prefix}.{name}.weight", role, Origin(f"mlp.{name}.weight", block, every))
        if shape.mlp_bias:
            bias = Origin(f"mlp.{name}.bias", block, (0, 1))
            layer.add_part(f"{prefix}.{name}.bias", Role.BIAS, bias)
    down = Origin("mlp.down_proj.weight", every, block)
    layer.add_part(f"{prefix}.down_proj.weight", Role.DOWN, down)
    if shape.mlp_bias and block[0] == 0:
        bias = Origin("mlp.down_proj.bias", every, (0, 1))
        layer.add_part(f"{prefix}.down_proj.bias", Role.BIAS, bias)
