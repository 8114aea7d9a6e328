"""Open a model's files with its tokenizer, and measure what the process comes to hold for it."""

from dataclasses import dataclass
from pathlib import Path

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint, without_vocabulary
from thinslice.memory.meter import anonymous_bytes, peak_rss_bytes
from thinslice.process import bound_allocator, return_free_pages
from thinslice.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Opening:
    """What opening a model's files took of this process's memory.

    Attributes:
        tokenizer_bytes: what was added to what the process holds, nearly all of it the tokenizer's.
            Memory that was free in the process before is not in it. 0 where the system does not
            tell.
        peak_bytes: the most the process held meanwhile; 0 where it had held more before.
    """

    tokenizer_bytes: int = 0
    peak_bytes: int = 0


NOT_OPENED = Opening()


@dataclass(frozen=True)
class Opened:
    """A model's files.

    Attributes:
        checkpoint: without the vocabulary in a GGUF's header, which the tokenizer has.
        took: what opening them took.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    took: Opening


def open_files(path: Path) -> Opened:
    """Open a model by its path, before it is planned: a plan begins above what the process holds.

    What was needed only while the tokenizer was made, up to three times what stays, has gone back
    to the system then.
    Errors: CheckpointError.
    """
    bound_allocator()
    return_free_pages()
    before, peak_before = anonymous_bytes(), peak_rss_bytes()
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    checkpoint = without_vocabulary(checkpoint)
    return_free_pages()
    added, peak = max(anonymous_bytes() - before, 0), peak_rss_bytes()
    return Opened(checkpoint, tokenizer, Opening(added, peak if peak > peak_before else 0))
