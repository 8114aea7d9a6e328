"""Text as it comes: tokens to whole characters, and stop strings held back until they are sure."""

import codecs
from collections.abc import Sequence

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


class StopStringMatcher:
    """Lets text through up to the first stop string; what may begin one is held back.

    ``matched`` is the stop string found, or None. Of several the one that is complete first counts,
    so that the outcome does not depend on how the text is cut into pieces. Time per push is
    proportional to the text, times the number of stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to show now; nothing once a stop string was found."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, self.matched = min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0]))
            self._held = ""
            return text[:start]
        safe = self._first_possible_start(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        """Return the start of the earliest suffix that may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1)
        for start in range(max(len(text) - longest + 1, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
