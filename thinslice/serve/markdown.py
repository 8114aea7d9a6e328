"""Markdown to HTML that is safe to show, whoever wrote it.

An answer is rendered again and again while it comes: blocks that are finished once, and the last
one each time. What is shown has gone through two hands: a parser that lets no HTML of the text
through, and a list of the elements and attributes that may pass.
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, table
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from thinslice.serve.code import CLASSES, code_block
from thinslice.serve.formula import add_formulas

# Characters of a text that is rendered at once.
MAX_TEXT = 16_384
# What stands under the head of a table, perhaps within a quote.
_RULER = re.compile(r"[\s|:>-]*-[\s|:-]*")
_MAX_CELLS = 4096
_BY_LAST_LINE = ("formula", "table_open")
# As the parser counts them.
_LINE_END = re.compile(r"\r\n?|\n")
# The page has headings of its own above an answer's.
_HEADINGS = {f"h{level}": f"h{min(level + 2, 6)}" for level in range(1, 7)}
_TEXT_TAGS = (
    "a blockquote br code del div em h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th "
    "thead tr ul"
)
# Of MathML Core and what stands in its place where browsers do not draw it. Neither annotations,
# which may hold HTML, nor what reacts to a click.
_MATH_TAGS = (
    "math menclose merror mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot "
    "mrow ms mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover"
)
_FLAGS = "accent accentunder display displaystyle fence form largeop movablelimits stretchy"
_WORDS = "columnalign columnlines mathvariant notation rowlines scriptlevel symmetric"
_LENGTHS = "depth height linethickness lspace maxsize minsize rspace voffset width"
# A length that takes nothing far from its place, and below zero hardly at all.
_LENGTH = re.compile(r"\+?\d?\d?(\.\d{1,4})?(em|ex|px|pt|mu|%)?|-\d?(\.\d{1,4})?(em|ex)")
_WORD = re.compile(r"[a-z0-9 +-]{0,80}")
# How the parser says where a column's text stands, and the class that stands for it here: the page
# takes no styles from anywhere.
_ALIGNED = {f"text-align:{side}": side for side in ("left", "center", "right")}


@dataclass(frozen=True)
class Rendered:
    """What became of a text.

    Attributes:
        finished: HTML of each block that stays as it is, whatever follows.
        rest: HTML of what may still change.
        taken: length of the text of the finished blocks, in UTF-16 units, as browsers count.
    """

    finished: list[str]
    rest: str
    taken: int


def render(text: str, *, is_whole: bool) -> Rendered:
    """Render a text, or the beginning of one that goes on.

    It takes some 5 microseconds a character, and a few times as much for maths.
    """
    tokens = _MARKDOWN.parse(text, {"is_whole": is_whole})
    blocks = [*_blocks(tokens)]
    if is_whole or not blocks:
        return Rendered([_html(one) for one in blocks], "", _units(text) if is_whole else 0)
    last = len(blocks) - 1
    start = _start(text, blocks[last])
    # What its last line makes of a block, or its first where that is not whole yet, may turn out to
    # belong to the block before.
    is_unsure = blocks[last][0].type in _BY_LAST_LINE or not _LINE_END.search(text, start)
    if last > 0 and is_unsure:
        last -= 1
        start = _start(text, blocks[last])
    rest = "".join(_html(one) for one in blocks[last:])
    return Rendered([_html(one) for one in blocks[:last]], rest, _units(text[:start]))


def _blocks(tokens: list[Token]) -> Iterator[list[Token]]:
    """The tokens of each block that stands in no other."""
    begin = 0
    for place, token in enumerate(tokens, 1):
        if token.level == 0 and token.nesting <= 0:
            yield tokens[begin:place]
            begin = place


def _start(text: str, block: list[Token]) -> int:
    """Where the text of a block begins."""
    assert block[0].map is not None, "blocks know their lines"
    number, place = block[0].map[0], 0
    for _ in range(number):
        found = _LINE_END.search(text, place)
        assert found is not None, "the parser counts lines in the same way"
        place = found.end()
    return place


def _units(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)


def _html(block: Sequence[Token]) -> str:
    """A block's HTML, clean."""
    drawn: str = _MARKDOWN.renderer.render(block, _MARKDOWN.options, {})
    return _CLEANER.clean(drawn)


def _table(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A table, where it has not more cells than there is room for: the parser fills up short rows,
    and 16,000 characters could make 65,000 cells of 1.3 KB each."""
    head = state.getLines(start_line, start_line + 1, 0, False)
    below = state.getLines(start_line + 1, start_line + 2, 0, False)
    if start_line + 2 > end_line or not _RULER.fullmatch(below):
        return False
    if start_line < state.env.get("no_table_before", 0):
        return False
    last = start_line
    while last < end_line and not state.isEmpty(last):
        last += 1
    if (head.count("|") + 1) * (last - start_line) > _MAX_CELLS:
        state.env["no_table_before"] = last  # counted once
        return False
    return table(state, start_line, end_line, silent)


def _fence(_renderer: object, tokens: Sequence[Token], place: int, *_: object) -> str:
    return code_block(tokens[place].content, tokens[place].info)


def _image(_renderer: object, tokens: Sequence[Token], place: int, *_: object) -> str:
    """A link in its place: nothing is fetched that nobody has asked for."""
    token = tokens[place]
    address = html.escape(str(token.attrGet("src") or ""))
    return f'<a href="{address}">{html.escape(token.content) or address}</a>'


def _table_open(*_: object) -> str:
    return '<div class="table"><table>\n'


def _table_close(*_: object) -> str:
    return "</table></div>\n"


def _fit_to_page(state: StateCore) -> None:
    for token in state.tokens:
        token.tag = _HEADINGS.get(token.tag, token.tag)
        side = _ALIGNED.get(str(token.attrs.pop("style", "")))
        if side is not None:
            token.attrSet("class", side)


def _parser() -> MarkdownIt:
    # What is nested more deeply is left out.
    bounds = {"html": False, "maxNesting": 40}
    parser = MarkdownIt("commonmark", bounds).enable(["table", "strikethrough"])
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    add_formulas(parser)
    parser.core.ruler.push("fit_to_page", _fit_to_page)
    for name, rule in (
        ("fence", _fence),
        ("code_block", _fence),
        ("image", _image),
        ("table_open", _table_open),
        ("table_close", _table_close),
    ):
        parser.add_render_rule(name, rule)
    return parser


def _attribute(_tag: str, name: str, value: str) -> str | None:
    """What passes of an attribute that may pass."""
    if name in _MEASURES:
        return value if _LENGTH.fullmatch(value) else None
    if name in _SMALL_WORDS:
        return value if _WORD.fullmatch(value) else None
    return value


_SMALL_WORDS = frozenset(f"{_FLAGS} {_WORDS}".split())
_MEASURES = frozenset(_LENGTHS.split())
_MARKDOWN = _parser()
_CLEANER = nh3.Cleaner(
    tags={*_TEXT_TAGS.split(), *_MATH_TAGS.split()},
    clean_content_tags={"script", "style"},
    attributes={
        "a": {"href", "title"},
        "math": {"alttext", "display"},
        "ol": {"start"},
        "pre": {"data-language"},
        **{tag: {*_SMALL_WORDS, *_MEASURES} for tag in _MATH_TAGS.split() if tag != "math"},
    },
    attribute_filter=_attribute,
    allowed_classes={
        "code": {"tex"},
        "div": {"math", "table"},
        "span": {*CLASSES, "wide"},
        **{cell: set(_ALIGNED.values()) for cell in ("td", "th")},
    },
    set_tag_attribute_values={"a": {"target": "_blank"}},
    link_rel="noopener noreferrer nofollow",
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
)
