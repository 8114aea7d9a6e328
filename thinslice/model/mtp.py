"""The multi-token-prediction layer of MiMo: one more decoder block that looks one token ahead.

Row p pairs the main model's residual stream after its last layer (before the final norm) with the
embedding of token p+1, and predicts token p+2. The embedding table and the head are the main
model's; its own final norm stands in for the main one.
Source: XiaomiMiMo/MiMo and its vLLM fork (models/mimo_mtp.py).
"""

import torch
from torch import nn

from thinslice.kernels.native_stack import NativePrediction
from thinslice.model.decoder import Decoder, DecoderBlock, LayerContext, Linear, RMSNorm
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packing import Packing


class MTPLayer(DecoderBlock):
    """One layer under ``model.mtp_layers.N``.

    ``stack`` holds it once more as one call into compiled code, as a Decoder's does.
    """

    def __init__(self, shape: ModelShape, packing: Packing | None = None) -> None:
        super().__init__(shape, None, packing)
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.token_layernorm = RMSNorm(size, eps)
        self.hidden_layernorm = RMSNorm(size, eps)
        self.input_proj = Linear(2 * size, size)
        self.final_layernorm = RMSNorm(size, eps)
        self.stack: NativePrediction | None = None

    def predict(
        self, hidden_TD: torch.Tensor, next_embedding_TD: torch.Tensor, context: LayerContext
    ) -> torch.Tensor:
        """Combine rows with the embeddings of their next tokens.

        Args:
            hidden_TD: residual stream of the main model before its final norm.
            next_embedding_TD: embedding rows of the tokens that follow.
            context: the same positions as the main model's rows, and this layer's own KV cache.

        Returns [T, D], to which the main model's head applies directly. Extra memory: 4 T D.
        """
        if self.stack is not None:
            rotary, batch = (context.cos_TR, context.sin_TR), context.batch
            rows = (hidden_TD, next_embedding_TD)
            return self.stack.predict(*rows, rotary, batch.slots_T, batch.sequences)
        hidden = self.hidden_layernorm(hidden_TD)
        token = self.token_layernorm(next_embedding_TD)
        # The hidden half comes first; DeepSeek-V3 and Megatron have it the other way round.
        x_TD = self.input_proj(torch.cat((hidden, token), dim=-1))
        return self.final_layernorm(super().forward(x_TD, context))


class MTPDecoder(Decoder):
    """A whole model with its multi-token-prediction layers."""

    def __init__(self, shape: ModelShape, packing: Packing | None = None) -> None:
        super().__init__(shape, packing)
        layers = (MTPLayer(shape, packing) for _ in range(shape.num_nextn_predict_layers))
        self.model.mtp_layers = nn.ModuleList(layers)
