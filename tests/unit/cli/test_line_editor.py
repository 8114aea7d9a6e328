"""Long texts stand as marks; keys that come together are one piece; the undo stack is bounded."""

import pytest
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

from thinslice.cli.line_editor import (
    LONGEST_LINE,
    LONGEST_MESSAGE,
    KeptTexts,
    _bound_undo,
    in_bursts,
)
from thinslice.errors import RequestError


def test_a_long_text_is_kept_aside_and_comes_back_whole() -> None:
    kept, buffer = KeptTexts(), Buffer()
    text = "0123456789" * 5000
    kept.insert(buffer, "Sum up: ")
    for at in range(0, len(text), 1000):
        kept.insert(buffer, text[at : at + 1000])
    kept.insert(buffer, "!", is_pasted=False)
    assert len(buffer.text) <= LONGEST_LINE + 40
    assert "characters]" in buffer.text
    assert kept.whole(buffer.text) == f"Sum up: {text}!"


def test_a_paste_that_comes_in_pieces_is_one_mark_and_what_is_typed_behind_it_is_seen() -> None:
    kept, buffer = KeptTexts(), Buffer()
    kept.insert(buffer, "Sum up: ")
    for length in (1000, 1000, 683):
        kept.insert(buffer, "x" * length)
    assert buffer.text == "Sum up: [text 1: 2,683 characters]"
    kept.insert(buffer, " briefly,")
    kept.insert(buffer, " please")
    assert buffer.text == "Sum up: [text 1: 2,683 characters] briefly, please"
    assert kept.whole(buffer.text) == "Sum up: " + "x" * 2683 + " briefly, please"
    kept.erase_mark(buffer)
    for length in (1000, 1000, 10):
        kept.insert(buffer, "y" * length)
    assert buffer.text.endswith(" briefly, please[text 2: 2,010 characters]")


def test_many_lines_are_kept_aside_too() -> None:
    kept, buffer = KeptTexts(), Buffer()
    kept.insert(buffer, "a\r\n" * 50)
    assert buffer.text == "[text 1: 100 characters]"
    assert kept.whole(buffer.text) == "a\n" * 50


def test_what_a_text_holds_is_not_read_as_marks() -> None:
    kept, buffer = KeptTexts(), Buffer()
    first, second = "[text 2: 3,000 characters]".ljust(3000), "y" * 3000
    kept.insert(buffer, first)
    kept.insert(buffer, " ", is_pasted=False)
    kept.insert(buffer, second)
    assert kept.whole(buffer.text) == f"{first} {second}"


def test_a_mark_is_erased_whole_and_an_edited_one_refused() -> None:
    kept, buffer = KeptTexts(), Buffer()
    kept.insert(buffer, "x" * 5000)
    buffer.delete_before_cursor(1)
    with pytest.raises(RequestError, match="was edited"):
        kept.whole(buffer.text)
    buffer.insert_text("]")
    assert kept.erase_mark(buffer)
    assert not kept.erase_mark(buffer)
    assert buffer.text == ""
    assert kept.whole("hello") == "hello"


def test_a_message_longer_than_any_context_is_refused_and_not_held() -> None:
    kept, buffer = KeptTexts(), Buffer()
    for _ in range(5):
        kept.insert(buffer, "x" * (LONGEST_MESSAGE // 2))
    assert sum(len(piece) for pieces in kept._pieces.values() for piece in pieces) <= (
        LONGEST_MESSAGE + 1
    )
    with pytest.raises(RequestError, match="1,048,576 characters and was not sent"):
        kept.whole(buffer.text)


def test_erased_texts_make_room_for_others() -> None:
    kept, buffer = KeptTexts(), Buffer()
    for _ in range(5):
        kept.insert(buffer, "x" * (LONGEST_MESSAGE // 2 + 10))
        kept.erase_mark(buffer)
    kept.insert(buffer, "y" * 5000)
    assert kept.whole(buffer.text) == "y" * 5000


def keys(*pressed: str) -> list[KeyPress]:
    return [KeyPress(key, "\t" if key == Keys.Tab else key) for key in pressed]


def test_characters_that_come_together_are_one_piece() -> None:
    joined = in_bursts(keys("a", "b", Keys.Enter, "c", Keys.Tab, "d", Keys.Left, "e"))
    assert [(one.key, one.data) for one in joined] == [
        (Keys.BracketedPaste, "ab"),
        (Keys.Enter, Keys.Enter),
        (Keys.BracketedPaste, "c\td"),
        (Keys.Left, Keys.Left),
        ("e", "e"),
    ]


def test_a_tab_behind_a_command_completes_it() -> None:
    assert [one.key for one in in_bursts(keys("/", "t", Keys.Tab))] == [
        Keys.BracketedPaste,
        Keys.Tab,
    ]


def test_the_states_that_can_be_undone_are_bounded() -> None:
    buffer = Buffer()
    buffer.on_text_changed += _bound_undo
    for number in range(500):
        buffer.save_to_undo_stack()
        buffer.insert_text(str(number))
    assert len(buffer._undo_stack) <= 51
    buffer.undo()
    assert not buffer.text.endswith("499")
