"""Token ids to text as they come: never a part of a character, and in sum the whole decoding."""

import codecs

from thinslice.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns a stream of token ids into text, in constant time per token.

    Bytes that may still become a character are held back; bytes that cannot are given as U+FFFD
    at once. Special tokens have no text. The pieces in sum equal ``tokenizer.decode`` of all ids;
    where they continue a text, the space that decoding drops at a beginning stays.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_at_start = tokenizer.strips_leading_space and not continues_text

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._strip(self._decoder.decode(self._tokenizer.shown_bytes(token_id)))

    def finish(self) -> str:
        """What was held back: an unfinished character, as U+FFFD."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        """Drop the one space that a SentencePiece tokenizer puts before the first word."""
        if self._is_at_start and text:
            self._is_at_start = False
            return text.removeprefix(" ")
        return text
