"""Generated text for the small test model: tasks whose answers follow from their prompts.

Four kinds: sums worked digit by digit, counting, copying, and renaming in lines of code. A tenth of
all prompts, told by a checksum of their text, is held out: training never sees one.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

END_OF_TEXT, TURN_START, TURN_END, THINK, THOUGHT = range(256, 261)
SPECIAL_TOKENS = {
    "<|endoftext|>": END_OF_TEXT,
    "<|im_start|>": TURN_START,
    "<|im_end|>": TURN_END,
    "<think>": THINK,
    "</think>": THOUGHT,
}
NUM_TOKENS = 261
_HELD_OUT_OF = 10
_CHAT_SHARE = 0.15
_NAMES = ("a", "b", "n", "x", "y", "sum", "row", "key", "left", "size", "total", "index")
_WORD_LIST = """
    apple bell bird blue boat bread chair cloud corn dark deer door dust east edge fern field
    fire fish flag fog gate gold grass hand hill honey ice iron jam kite lake lamp leaf lion
    milk moon moss nest night oak ocean owl page pearl pine quilt rain red river road rock rose
    sand ship silk snow star stone sun tea tin tree vine wave wheat wind wolf wood yarn
"""
WORDS = _WORD_LIST.split()
_LINES = (
    "{a} = {b} + {n}",
    "{a} += {n}",
    "print({a})",
    "return {a} - {b}",
    "if {a} > {n}:",
    "{b} = f({a}, {n})",
    "while {b} < {a}:",
    "{a} = {a} * {b}",
)


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as text; each ends where the other begins."""

    kind: str
    prompt: str
    answer: str

    @property
    def is_held_out(self) -> bool:
        """Whether training leaves it out; the same on every machine."""
        return zlib.crc32(self.prompt.encode()) % _HELD_OUT_OF == 0

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as a plain text."""
        return encode(self.prompt + "\n")

    @property
    def answer_ids(self) -> list[int]:
        """The answer with the end of text."""
        return [*encode(self.answer), END_OF_TEXT]

    @property
    def chat_prompt_ids(self) -> list[int]:
        """The prompt as a user's turn, up to where the assistant answers."""
        user = [TURN_START, *encode(f"user\n{self.prompt}"), TURN_END, *encode("\n")]
        return [*user, TURN_START, *encode("assistant\n")]

    @property
    def chat_answer_ids(self) -> list[int]:
        """The answer as the assistant's turn, to its end."""
        return [*encode(self.answer), TURN_END]


def encode(text: str) -> list[int]:
    """Bytes as token ids, the reasoning tags as tokens of their own."""
    ids: list[int] = []
    for part in re.split("(</?think>)", text):
        ids += [SPECIAL_TOKENS[part]] if part in SPECIAL_TOKENS else part.encode()
    return ids


def examples(rng: random.Random, held_out: bool) -> Iterator[Example]:
    """Examples without end, of all kinds in equal shares: those of training, or those held out."""
    while True:
        example = rng.choice(KINDS)(rng)
        if example.is_held_out == held_out:
            yield example


def training_rows(rng: random.Random, length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows of ``length`` tokens, examples one after the other from the row's start.

    Beside each token stands whether it belongs to an answer.
    """
    source = examples(rng, held_out=False)
    while True:
        ids: list[int] = []
        is_answer: list[bool] = []
        while len(ids) < length:
            example = next(source)
            prompt, answer = example.prompt_ids, example.answer_ids
            if rng.random() < _CHAT_SHARE:
                prompt, answer = example.chat_prompt_ids, example.chat_answer_ids
            ids += prompt + answer
            is_answer += [False] * len(prompt) + [True] * len(answer)
        yield ids[:length], is_answer[:length]


def _sum(rng: random.Random) -> Example:
    """``47+85`` is worked as ``7+5=12 4+8+1=13``: units, then tens with the carry."""
    first, second = rng.randrange(10, 100), rng.randrange(10, 100)
    units = first % 10 + second % 10
    carry = "+1" if units > 9 else ""
    tens = first // 10 + second // 10 + (units > 9)
    steps = f"{first % 10}+{second % 10}={units} {first // 10}+{second // 10}{carry}={tens}"
    return Example("sum", f"{first}+{second}=", f"<think>{steps}</think>{first + second}")


def _count(rng: random.Random) -> Example:
    start, step = rng.randrange(0, 100), rng.randrange(1, 10)
    terms = " ".join(str(start + step * turn) for turn in range(1, 9))
    return Example("count", f"count from {start} by {step}", terms)


def _copy(rng: random.Random) -> Example:
    text = " ".join(rng.sample(WORDS, rng.randrange(3, 7)))
    return Example("copy", f"copy {text}", text)


def _rename(rng: random.Random) -> Example:
    old, other, new = rng.sample(_NAMES, 3)
    lines = rng.sample(_LINES, rng.randrange(2, 4))
    number = rng.randrange(10)
    before, after = (
        "\n".join(line.format(a=name, b=other, n=number) for line in lines) for name in (old, new)
    )
    return Example("rename", f"rename {old} to {new}\n{before}\n", after)


KINDS: tuple[Callable[[random.Random], Example], ...] = (_sum, _count, _copy, _rename)
