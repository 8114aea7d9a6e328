"""ModelShape: the sizes of a dense decoder, under the names Hugging Face's config.json uses.

Arithmetic and validation only. Reading a config.json is in shape_from_config.py, a GGUF header in
shape_from_gguf.py.
"""

from dataclasses import dataclass

from thinslice.errors import CheckpointError

# Far above any dense model we run (up to about 32B); a header that asks for more is lying.
_LARGEST = {
    "vocab_size": 1 << 21,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 27,
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    ``rope_type`` is ``linear``, ``llama3``, ``yarn`` or ``factors`` (explicit divisors for each
    frequency, as a GGUF stores them). Fields a type does not use keep their defaults.
    """

    rope_type: str
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """All that the decoder, the planner and the name check need to know of a model.

    Attributes:
        attention_bias: q, k and v projections have a bias.
        attention_out_bias: the output projection has a bias (Llama with ``attention_bias``).
        use_qk_norm: RMSNorm over each head of q and k (Qwen3).
        sliding_window: positions a query sees, or None; holds for layers in ``sliding_layers``.
        num_nextn_predict_layers: multi-token-prediction layers (MiMo).
        eos_token_ids: every id that ends a generation.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    use_qk_norm: bool = False
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    sliding_window: int | None = None
    sliding_layers: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= largest:
                raise CheckpointError(f"{name} is {value!r}; expected a whole number 1..{largest}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary embedding needs it even")
        if not 0 <= self.num_nextn_predict_layers <= 16:
            raise CheckpointError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; expected 0..16"
            )
        if not 0.0 < self.rms_norm_eps < 1.0 or not 0.0 < self.rope_theta < 1e15:
            raise CheckpointError(
                f"rms_norm_eps {self.rms_norm_eps} or rope_theta {self.rope_theta} is out of range"
            )

    @property
    def head_name(self) -> str:
        """The tensor that makes logits: the embedding table, where the two are tied."""
        return "model.embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"

    @property
    def q_size(self) -> int:
        """Rows of q_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    def window_of(self, layer_idx: int) -> int | None:
        """Positions a query of this layer sees (itself included), or None for all."""
        return self.sliding_window if layer_idx in self.sliding_layers else None
