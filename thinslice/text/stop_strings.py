"""Stop strings in a stream of text: what may begin one is held back until it is sure."""

from collections.abc import Sequence


class StopStringMatcher:
    """Lets text through up to the first stop string.

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
