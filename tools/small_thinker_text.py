"""Generated text for the small thinking model: thoughts of every length, whole and cut short.

The task is to count down from a number to 10: the thought names every number on the way, three
tokens each, and the answer is the last number that the thought names whole. So a thought that is
cut short has an answer too. A tenth of all prompts is held out, as in small_mtp_text.py.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from thinslice.text.reasoning import CLOSE, OPEN, WRAP_UP
from tools.small_mtp_text import TURN_END, WORDS, Example, encode

SMALLEST, LARGEST = 10, 99
_CUT_SHARE, _WRAPPED_SHARE, _THOUGHTLESS_SHARE = 0.4, 0.5, 0.1


@dataclass(frozen=True)
class Answered:
    """What the assistant writes, and of each token whether the model is to learn to write it."""

    token_ids: list[int]
    is_learned: list[bool]


def prompts(rng: random.Random, held_out: bool) -> Iterator[Example]:
    """Prompts without end, with the thought and the answer of a model that is left alone."""
    while True:
        first = rng.randrange(SMALLEST + 1, LARGEST + 1)
        thought = " ".join(str(number) for number in range(first, SMALLEST - 1, -1))
        answer = f"{OPEN}\n{thought}\n{CLOSE}\n\n{SMALLEST}"
        example = Example("count", f"{rng.choice(WORDS)}: down from {first}", answer)
        if example.is_held_out == held_out:
            yield example


def training_rows(rng: random.Random, length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows of ``length`` tokens, conversations one after the other from the row's start.

    Beside each token stands whether it is one that the model is to learn to write.
    """
    source = prompts(rng, held_out=False)
    while True:
        ids: list[int] = []
        is_learned: list[bool] = []
        while len(ids) < length:
            example = next(source)
            prompt, answered = example.chat_prompt_ids, _answered(rng, example)
            ids += prompt + answered.token_ids
            is_learned += [False] * len(prompt) + answered.is_learned
        yield ids[:length], is_learned[:length]


def _answered(rng: random.Random, example: Example) -> Answered:
    """The whole answer, one without a thought, or one whose thought somebody else has ended."""
    thought, _, last = example.answer.removeprefix(f"{OPEN}\n").partition(f"\n{CLOSE}\n\n")
    kind = rng.random()
    if kind < _THOUGHTLESS_SHARE:
        return _joined((f"{OPEN}\n\n{CLOSE}\n\n", False), (last, True))
    if kind > _THOUGHTLESS_SHARE + _CUT_SHARE:
        return _joined((example.answer, True))
    cut = thought[: rng.randrange(len(thought))]
    numbers = cut[: cut.rfind(" ") + 1].split() or [thought[:2]]
    wrap_up = WRAP_UP if rng.random() < _WRAPPED_SHARE else ""
    return _joined(
        (f"{OPEN}\n{cut}", True), (f"{wrap_up}{CLOSE}", False), (f"\n\n{numbers[-1]}", True)
    )


def _joined(*parts: tuple[str, bool]) -> Answered:
    """The parts with the turn's end, which is learned."""
    ids: list[int] = []
    is_learned: list[bool] = []
    for text, learned in parts:
        part = encode(text)
        ids += part
        is_learned += [learned] * len(part)
    return Answered([*ids, TURN_END], [*is_learned, True])
