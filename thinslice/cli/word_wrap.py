"""Text that comes piece by piece, broken into a terminal's lines between words."""

from collections.abc import Callable

_TAB = 8
# Code points. A cluster of more is no character of any script: it is written as it is.
_LONGEST_CLUSTER = 256


class WordWrap:
    """Decides where lines end. A word is held back until the next character shows that it is whole.

    Lines break at spaces and around wide characters (Chinese, Japanese, Korean, emoji); inside a
    word only where it is longer than a line. Grapheme clusters are never split: combining marks
    stay with their letter and count no column. The order of the characters is the text's own, so
    the terminal lays out right-to-left scripts as it does for any other text.

    Args:
        width: the terminal's columns, asked for each word, as a window may be resized.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._tail = ""  # the last cluster, which the next piece may go on with
        self._spaces = ""
        self._word: list[str] = []
        self._word_width = 0
        self._out: list[str] = []

    def push(self, text: str) -> str:
        """What can be written now that this text has come."""
        clusters = _clusters(self._tail + text.replace("\r\n", "\n").replace("\r", ""))
        self._tail = ""
        if clusters and clusters[-1] != "\n" and len(clusters[-1]) <= _LONGEST_CLUSTER:
            self._tail = clusters.pop()
        for cluster in clusters:
            self._take(cluster)
        return self._taken()

    def finish(self) -> str:
        """The rest, at the end of the text."""
        if self._tail:
            self._take(self._tail)
            self._tail = ""
        self._place_word()
        return self._taken()

    def _taken(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    def _take(self, cluster: str) -> None:
        if cluster == "\n":
            self._place_word()
            self._spaces = ""
            self._break()
        elif cluster in (" ", "\t"):
            self._place_word()
            self._spaces += cluster
        else:
            self._take_letter(cluster)

    def _take_letter(self, cluster: str) -> None:
        columns = _columns(cluster)
        is_wide = _columns(cluster[0]) == 2
        if is_wide:
            self._place_word()
        self._word.append(cluster)
        self._word_width += columns
        if is_wide or self._word_width >= self._width():
            self._place_word()

    def _place_word(self) -> None:
        """Write the word that is held, on this line where it fits, else on the next one."""
        if not self._word:
            return
        spaces = self._expanded_spaces()
        if self._column and self._column + len(spaces) + self._word_width > self._width():
            self._break()
            spaces = ""
        self._out.append(spaces)
        self._column += len(spaces)
        for cluster in self._word:
            columns = _columns(cluster)
            if self._column and self._column + columns > self._width():
                self._break()
            self._out.append(cluster)
            self._column += columns
        self._spaces, self._word, self._word_width = "", [], 0

    def _expanded_spaces(self) -> str:
        """The spaces before the word; a tab goes to the next column that is a multiple of 8."""
        column = self._column
        for space in self._spaces:
            column += _TAB - column % _TAB if space == "\t" else 1
        return " " * min(column - self._column, max(self._width() - 1, 0))

    def _break(self) -> None:
        self._out.append("\n")
        self._column = 0


def _clusters(text: str) -> list[str]:
    if text.isascii():  # without what a table of all characters takes to import
        return list(text)
    from wcwidth import iter_graphemes

    return list(iter_graphemes(text))


def _columns(cluster: str) -> int:
    if cluster.isascii() and cluster.isprintable():
        return len(cluster)
    from wcwidth import wcswidth

    return max(wcswidth(cluster), 0)
