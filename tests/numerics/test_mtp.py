"""The MTP layer against a second implementation written from the published description.

Source: XiaomiMiMo/MiMo and its vLLM fork. Row p combines the residual stream h_p (before the main
model's final norm) with the embedding of token p+1: norm both, concatenate hidden first, project,
one Qwen2 block with rotary position p, then the layer's own final norm.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.arrays import array_of, tensor_of
from tests.engines import resident_weights
from thinslice.checkpoint.names import expected_tensors
from thinslice.kernels.paged_kv import PagedKv
from thinslice.model.batch import TokenRun, pack
from thinslice.model.decoder import Decoder
from thinslice.model.mtp import PredictionLayer
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.tensors import Room, tensors_of

MIMO_7B = ModelShape(
    architecture="MiMoForCausalLM",
    vocab_size=151680,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=640000.0,
    max_position_embeddings=32768,
    attention_bias=True,
    num_nextn_predict_layers=1,
)
TINY = replace(
    MIMO_7B,
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
Tensors = dict[str, torch.Tensor]
# Some of model.safetensors.index.json and the headers of XiaomiMiMo/MiMo-7B-RL.
PUBLISHED = {
    "model.embed_tokens.weight": (151680, 4096),
    "model.layers.0.self_attn.q_proj.bias": (4096,),
    "model.layers.0.self_attn.k_proj.weight": (1024, 4096),
    "model.layers.35.self_attn.o_proj.weight": (4096, 4096),
    "model.layers.35.mlp.down_proj.weight": (4096, 11008),
    "model.layers.35.post_attention_layernorm.weight": (4096,),
    "model.norm.weight": (4096,),
    "lm_head.weight": (151680, 4096),
    "model.mtp_layers.0.input_proj.weight": (4096, 8192),
    "model.mtp_layers.0.token_layernorm.weight": (4096,),
    "model.mtp_layers.0.hidden_layernorm.weight": (4096,),
    "model.mtp_layers.0.final_layernorm.weight": (4096,),
    "model.mtp_layers.0.mlp.gate_proj.weight": (11008, 4096),
}


def test_mimo_7b_has_its_published_tensors_and_parameters() -> None:
    shapes = expected_tensors(MIMO_7B)
    assert len(shapes) == len(tensors_of(MIMO_7B)) == 451
    assert PUBLISHED.items() <= shapes.items()
    assert sum(one.numel for one in tensors_of(MIMO_7B)) == 7_833_409_536
    is_prediction = {one: one.room is Room.PREDICTION for one in tensors_of(MIMO_7B)}
    main = sum(one.numel for one, is_one in is_prediction.items() if not is_one)
    assert main == 7_622_619_136
    assert sum(one.numel for one, is_one in is_prediction.items() if is_one) == 210_790_400


def random_weights() -> Tensors:
    torch.manual_seed(3)
    return {one.name: torch.randn(one.shape) * 0.3 for one in tensors_of(TINY)}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotate pairs (i, i + H/2) of one head's vector, as complex numbers."""
    half = x.shape[-1] // 2
    frequency = 640000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones(half, dtype=torch.float64), position * frequency
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def plain_mtp(tensors: Tensors, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """The layer in float64, one row and one head at a time."""
    w = {
        name.removeprefix("model.mtp_layers.0."): value.double() for name, value in tensors.items()
    }
    normed = (
        norm(hidden.double(), w["hidden_layernorm.weight"]),
        norm(embedding.double(), w["token_layernorm.weight"]),
    )
    rows = torch.cat(normed, dim=-1) @ w["input_proj.weight"].T
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    out = []
    for position, row in enumerate(rows):
        x = norm(row, w["input_layernorm.weight"])
        q, k, v = (
            w[f"self_attn.{part}_proj.weight"] @ x + w[f"self_attn.{part}_proj.bias"]
            for part in "qkv"
        )
        keys.append(rotate(k.view(2, 8), position))
        values.append(v.view(2, 8))
        mixed = []
        for head, query in enumerate(rotate(q.view(4, 8), position)):
            scores = torch.stack([key[head // 2] @ query for key in keys]) / 8**0.5
            shares = scores.softmax(0)
            mixed.append(sum(s * v[head // 2] for s, v in zip(shares, values, strict=True)))
        row = row + w["self_attn.o_proj.weight"] @ torch.cat(mixed)
        x = norm(row, w["post_attention_layernorm.weight"])
        gate, up = w["mlp.gate_proj.weight"] @ x, w["mlp.up_proj.weight"] @ x
        row = row + w["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        out.append(norm(row, w["final_layernorm.weight"]))
    return torch.stack(out)


def own_mtp(tensors: Tensors, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    batch = pack([TokenRun(range(len(hidden)), 0, [0])], block_size=16)
    cache = PagedKv(*np.zeros((2, 1, 2, 16, 8), np.float32))
    layer = PredictionLayer(Decoder(TINY), resident_weights(TINY, tensors), 0, cache)
    return tensor_of(layer.predict(array_of(hidden), array_of(embedding), batch))


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(11, 32), torch.randn(11, 32)


def test_mtp_layer_equals_the_plain_one() -> None:
    tensors, (hidden, embedding) = random_weights(), rows()
    expected = plain_mtp(tensors, hidden, embedding)
    torch.testing.assert_close(own_mtp(tensors, hidden, embedding), expected.float())


def embedding_first(tensors: Tensors) -> None:
    first, second = tensors["model.mtp_layers.0.input_proj.weight"].chunk(2, dim=1)
    tensors["model.mtp_layers.0.input_proj.weight"] = torch.cat((second, first), dim=1)


def swapped_norms(tensors: Tensors) -> None:
    prefix = "model.mtp_layers.0."
    a, b = prefix + "token_layernorm.weight", prefix + "hidden_layernorm.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def main_norm_at_the_end(tensors: Tensors) -> None:
    tensors["model.mtp_layers.0.final_layernorm.weight"] = tensors["model.norm.weight"]


@pytest.mark.parametrize("fault", [embedding_first, swapped_norms, main_norm_at_the_end])
def test_faults_in_the_order_or_the_norms_are_seen(fault: Callable[[Tensors], None]) -> None:
    tensors, (hidden, embedding) = random_weights(), rows()
    expected = plain_mtp(tensors, hidden, embedding)
    fault(tensors)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(own_mtp(tensors, hidden, embedding), expected.float())


def test_a_normed_hidden_state_is_seen() -> None:
    """The layer takes the residual stream before the main final norm, not after it."""
    tensors, (hidden, embedding) = random_weights(), rows()
    expected = plain_mtp(tensors, hidden, embedding)
    normed = norm(hidden, tensors["model.norm.weight"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(own_mtp(tensors, normed, embedding), expected.float())
