"""Leave out of an opened GGUF what its tokenizer is made of, and read it in again.

A GGUF's header holds the vocabulary: as Python objects about 200 bytes a token with its merges, of
which nothing is needed once the tokenizer is made.
"""

from dataclasses import replace

from thinslice.checkpoint.gguf_header import GgufMetadata
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint

_LISTS = frozenset(
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")
)


def without_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, its metadata without the lists of tokens, scores and merges."""
    metadata = checkpoint.metadata
    if not isinstance(metadata, GgufMetadata):
        return checkpoint
    return replace(checkpoint, metadata=metadata.without(_LISTS))


def with_vocabulary(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with all of its metadata; its header is read again where lists were left out.

    Peak extra memory: the header's, see ``read_gguf_header``.
    Errors: CheckpointError as ``open_checkpoint``.
    """
    metadata = checkpoint.metadata
    if not isinstance(metadata, GgufMetadata) or metadata.is_whole:
        return checkpoint
    return replace(checkpoint, metadata=open_checkpoint(checkpoint.path).metadata)
