"""The room that a plan leaves to answers, asked for in the middle of being asked for."""

import sys
from types import FrameType

from tests.engines import tiny_engine
from thinslice.engine.results import Held, ResultsRoom
from thinslice.units import KIB


def room() -> ResultsRoom:
    return tiny_engine().results


class Handler:
    """Takes and gives back in the middle of what runs, before the line with this number."""

    def __init__(self, asked: ResultsRoom, at: int) -> None:
        self.asked, self.at = asked, at
        self.num_lines = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> object:
        if event == "line" and frame.f_code.co_filename.endswith("engine/results.py"):
            if self.num_lines == self.at:
                sys.settrace(None)
                held = Held(self.asked)
                assert held.take(100)
                held.release()
                self.asked.take(7)
                sys.settrace(self)
            self.num_lines += 1
        return self


def lines_passed(at: int) -> int:
    """Take room with a handler at a line, and see that all of it is counted."""
    asked, before = room(), sys.gettrace()
    left = asked.left_bytes
    asked.take(30)
    asked.release(20)
    handler = Handler(asked, at)
    sys.settrace(handler)
    try:
        assert asked.take(1000)
    finally:
        sys.settrace(before)
    taken = 7 if 0 <= at < handler.num_lines else 0
    assert asked.left_bytes == left - 10 - 1000 - taken, f"line {at}"
    return handler.num_lines


def test_what_a_signal_handler_takes_and_gives_back_at_any_line_is_counted() -> None:
    num_lines = lines_passed(-1)
    assert num_lines > 8
    for at in range(num_lines):
        lines_passed(at)


def test_no_more_is_promised_than_there_is() -> None:
    asked = room()
    left = asked.left_bytes
    assert not asked.take(left + 1)
    assert asked.left_bytes == left
    assert asked.take(left)
    assert not asked.take(1)


def test_what_is_taken_after_its_holder_was_let_go_comes_back_at_once() -> None:
    """As an engine's thread does, in the middle of a step that brings something for it."""
    asked = room()
    left = asked.left_bytes
    held = Held(asked)
    for _ in range(200):
        assert held.take(30)
    assert asked.left_bytes == left - 200 * 30
    held.release()
    assert asked.left_bytes == left
    held.use(1000, "texts")
    held.release()
    assert asked.left_bytes == left


def test_what_is_promised_shrinks_with_what_is_in_use() -> None:
    asked = room()
    left = asked.left_bytes
    held = Held(asked)
    held.have(100 * KIB, "texts")
    assert 0 <= left - asked.left_bytes - 100 * KIB < 8 * KIB
    held.have(70 * KIB, "texts")
    assert left - asked.left_bytes == 70 * KIB
    held.have(60 * KIB, "texts")  # what is near is kept
    held.use(5 * KIB, "texts")
    assert left - asked.left_bytes == 70 * KIB
    held.release()
    assert asked.left_bytes == left
