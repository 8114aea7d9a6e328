"""The multi-token-prediction layer of MiMo: one more decoder layer that looks one token ahead.

Row p pairs the main model's residual stream after its last layer (before the final norm) with the
embedding of token p+1, and predicts token p+2. The embedding table and the head are the main
model's; its own final norm stands in for the main one.
Source: XiaomiMiMo/MiMo and its vLLM fork (models/mimo_mtp.py).
"""

from thinslice.kernels.arrays import Array
from thinslice.kernels.paged_kv import PagedKv
from thinslice.model.batch import ForwardBatch
from thinslice.model.decoder import Decoder, LayerContext, run_layer
from thinslice.model.weights import Weights


class PredictionLayer:
    """One of a model's prediction layers, with a KV cache of its own.

    Args:
        index: which of them.
    """

    def __init__(self, decoder: Decoder, weights: Weights, index: int, kv_cache: PagedKv) -> None:
        self.decoder = decoder
        self.weights = weights
        self.index = index
        self.kv_cache = kv_cache

    def predict(self, hidden_TD: Array, next_embedding_TD: Array, batch: ForwardBatch) -> Array:
        """Combine rows with the embeddings of their next tokens.

        Args:
            hidden_TD: residual stream of the main model before its final norm, or the output of
                the layer before.
            next_embedding_TD: embedding rows of the tokens that follow.
            batch: the same positions as the main model's rows.

        Returns [T, D], to which the main model's head applies directly. Extra memory: 4 T D.
        """
        decoder, ops = self.decoder, self.weights.ops
        rotary, eps = decoder.rotary_tables(batch, ops), decoder.shape.rms_norm_eps
        fused = self.weights.fused_predictions[self.index]
        if fused is not None:
            return fused.predict(
                hidden_TD, next_embedding_TD, rotary, batch.slots_T, batch.sequences
            )
        prediction = self.weights.predictions[self.index]
        hidden = ops.rms_norm(hidden_TD, prediction.hidden_norm, eps)
        token = ops.rms_norm(next_embedding_TD, prediction.token_norm, eps)
        # The hidden half comes first; DeepSeek-V3 and Megatron have it the other way round.
        x_TD = ops.linear(ops.side_by_side([hidden, token]), prediction.pairing)
        context = LayerContext(ops, decoder.shape, batch, rotary, self.kv_cache, window=None)
        x_TD = run_layer(x_TD, prediction.layer, context)
        return ops.rms_norm(x_TD, prediction.final_norm, eps)
