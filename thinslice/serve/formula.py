"""Formulas: where they stand in markdown, and their MathML.

The plugins of markdown-it-py know no ``\\(`` and ``\\[``, and look for the end of a formula through
all of the text: 16,000 characters of ``$$a`` in paragraphs take them 6 seconds, and twice as many
four times as long. These rules look a bounded way ahead.
"""

import html
import re
from collections.abc import Sequence
from xml.etree import ElementTree

from latex2mathml.converter import Converter
from markdown_it import MarkdownIt
from markdown_it.ruler import RuleOptionsType
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from thinslice.engine.contained import Contained

MAX_FORMULA = 4000
_MAX_LINES = 50
_LONG = 60
# Environments that are formulas where no delimiter says so, under their names in amsmath.
_TOP = "equation|align|alignat|flalign|gather|multline|eqnarray|[pbvBV]?matrix"
_BEGIN = re.compile(rf"\\begin\{{((?:{_TOP})\*?)\}}")
_INLINE = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
# What the converter calls by another name, or has no name for.
_NAMES = {
    **dict.fromkeys(("align", "aligned", "split", "flalign", "flalign*", "eqnarray"), "align*"),
    **dict.fromkeys(("eqnarray*", "alignat", "alignat*", "alignedat"), "align*"),
    **dict.fromkeys(("gather", "gather*", "gathered", "multline", "multline*"), "matrix"),
    **dict.fromkeys(("equation", "equation*"), "matrix"),
    "dcases": "cases",
}
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([a-zA-Z]+\*?)\}")
_COLUMNS = re.compile(r"(\\begin\{(?:alignat\*?|alignedat)\})\s*\{\d*\}")
# They expand without end, or into more than there is room for.
_MACROS = re.compile(r"\\(?:def|let|newcommand|renewcommand|newenvironment|DeclareMathOperator)\b")


def add_formulas(markdown: MarkdownIt) -> None:
    """Have a parser know formulas: ``$a$``, ``$$a$$``, those of LaTeX, and its environments."""
    stops: RuleOptionsType = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    markdown.block.ruler.before("fence", "formula", _block_rule, stops)
    markdown.inline.ruler.before("escape", "formula", _inline_rule)
    markdown.add_render_rule("formula", _rendered)


def mathml(source: str, *, is_display: bool) -> str | None:
    """A formula as a ``math`` element; None for what is unfinished, too long or no formula."""
    if len(source) > MAX_FORMULA or _MACROS.search(source):
        return None
    given = _ENVIRONMENT.sub(_renamed, _COLUMNS.sub(r"\1", source))
    with Contained() as trouble:  # it raises whatever comes, from KeyError to StopIteration
        converter = Converter(display="block" if is_display else "inline")
        found = converter.convert_to_element(given)
    if trouble.error is not None:
        return None
    # The converter writes characters as references, and expects them to be read as such again.
    for node in found.iter():
        node.text = html.unescape(node.text or "")
    found.attrib.pop("xmlns")
    found.set("alttext", source)
    return ElementTree.tostring(found, encoding="unicode", short_empty_elements=False)


def _renamed(match: re.Match[str]) -> str:
    which, name = match.groups()
    return f"\\{which}{{{_NAMES.get(name, name)}}}"


def _rendered(_renderer: object, tokens: Sequence[Token], place: int, *_: object) -> str:
    token = tokens[place]
    is_display = token.block or token.markup.startswith(("$$", "\\["))
    found = None if token.hidden else mathml(token.content, is_display=is_display)
    if token.block:
        source = f'<code class="tex">{html.escape(token.markup)}</code>'
        return f'<div class="math">{found or source}</div>\n'
    if not found:
        return f'<code class="tex">{html.escape(token.markup)}</code>'
    # Browsers break no formula; where it is long it scrolls.
    return found if len(token.content) < _LONG else f'<span class="wide">{found}</span>'


def _block_rule(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A formula on lines of its own.

    One that has no end yet, where the text goes on later, is shown as its source, so that a line of
    it that begins with a minus makes no list.
    """
    if state.is_code_block(start_line):
        return False
    first = _line(state, start_line)
    closing, opening = _delimiters(first)
    if not closing:
        return False
    last = start_line
    # Behind the opening, that "$$" does not close itself.
    line = first[opening:]
    while not line.rstrip().endswith(closing):
        last += 1
        if last >= end_line:
            break
        if closing in line or last - start_line > _MAX_LINES:
            return False
        line = _line(state, last)
        if not line.strip() or state.sCount[last] < state.blkIndent:
            return False
    is_open = last >= end_line
    if is_open and (state.env["is_whole"] or state.level > 0):  # a list or a quote may end there
        return False
    if not silent:
        state.line = last if is_open else last + 1
        token = state.push("formula", "", 0)
        token.block, token.hidden = True, is_open
        token.map = [start_line, state.line]
        token.markup = state.getLines(start_line, state.line, state.blkIndent, False).strip()
        is_environment = token.markup.startswith("\\begin")
        token.content = token.markup if is_environment else token.markup[2:-2].strip()
    return True


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]


def _delimiters(line: str) -> tuple[str, int]:
    """What closes the formula that a line begins with, and how long what opens it is."""
    if line.startswith("$$"):
        return "$$", 2
    if line.startswith("\\["):
        return "\\]", 2
    found = _BEGIN.match(line)
    return (f"\\end{{{found[1]}}}", found.end()) if found else ("", 0)


def _inline_rule(state: StateInline, silent: bool) -> bool:
    """A formula within a line. A dollar before a space or behind a digit is money, and so is one
    that would end a formula before a digit or behind a space."""
    source, pos = state.src, state.pos
    opening = next((one for one in _INLINE if source.startswith(one, pos)), None)
    if opening is None:
        return False
    begin, closing = pos + len(opening), _INLINE[opening]
    end = _end(source, begin, closing)
    if end <= begin or not source[begin:end].strip():
        return False
    after = end + len(closing)
    if opening == "$":
        is_spaced = source[begin].isspace() or source[end - 1].isspace()
        is_money = source[pos - 1 : pos].isdigit() or source[after : after + 1].isdigit()
        if is_spaced or is_money:
            return False
    if not silent:
        token = state.push("formula", "", 0)
        token.markup = source[pos:after]
        token.content = source[begin:end].strip()
    state.pos = after
    return True


def _end(source: str, begin: int, closing: str) -> int:
    """Where a formula ends; -1 for nowhere near."""
    limit = begin + MAX_FORMULA
    end = source.find(closing, begin, limit)
    while end > 0 and _is_escaped(source, begin, end):
        end = source.find(closing, end + 1, limit)
    return end


def _is_escaped(source: str, begin: int, place: int) -> bool:
    before = source[begin:place]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
