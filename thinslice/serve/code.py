"""Code in colours: from a block of it to HTML with a class for each kind of word."""

import html
from collections.abc import Iterator
from functools import cache
from io import StringIO
from time import thread_time
from typing import Any

from pygments.formatters.html import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES, Text

# More is shown without colours.
MAX_CODE = 8192
# Of this thread's own time; what comes later has none. 16,000 line ends take a lexer 20 seconds.
MAX_SECONDS = 0.1
# Of Pygments' 500 lexers those of what answers are written in.
_NAMES = (
    "bash c c++ cpp cs csharp css diff go html java javascript js json kotlin lua php py python r "
    "rb rs ruby rust sh shell sql swift toml ts typescript xml yaml yml"
)
LANGUAGES = frozenset(_NAMES.split())
CLASSES = frozenset(one for one in STANDARD_TYPES.values() if one)
_MAX_NAME = 30
_FORMATTER = HtmlFormatter(nowrap=True)


def code_block(text: str, info: str) -> str:
    """A ``pre`` element, with the first word behind the fence, ``info``, as its language."""
    language = info.split(maxsplit=1)[0].lower() if info.strip() else ""
    is_coloured = language in LANGUAGES and len(text) <= MAX_CODE
    inner = _coloured(text, language) if is_coloured else html.escape(text)
    name = html.escape(language[:_MAX_NAME])
    return f'<pre data-language="{name}"><code>{inner}</code></pre>\n'


def _coloured(text: str, language: str) -> str:
    written = StringIO()
    _FORMATTER.format(_in_time(text, _lexer(language)), written)
    return written.getvalue()


def _in_time(text: str, lexer: Lexer) -> Iterator[tuple[Any, str]]:
    """The words of a text, until the time is up, and then the rest of it as one."""
    until, place = thread_time() + MAX_SECONDS, 0
    for kind, word in lexer.get_tokens(text):
        yield kind, word
        place += len(word)
        if thread_time() > until:
            break
    yield Text, text[place:]


@cache
def _lexer(language: str) -> Lexer:
    return get_lexer_by_name(language, stripnl=False)
