"""ThoughtBudget: leads a thought to its end before it has more tokens, or time, than it may have.

llama.cpp and vLLM count the tokens of the thought itself and put the closing tag, and a text where
one is given, on top; here all of it together stays within the budget. The idea of ending a thought
by force and letting the model answer is s1's (arXiv 2501.19393).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thinslice.engine.processors import Tokens
from thinslice.errors import RequestError
from thinslice.forks import cached_property
from thinslice.kernels.arrays import Floats
from thinslice.text.reasoning import CLOSE, OPEN, WRAP_UP, Phase, Thought
from thinslice.text.tokenizer import Tokenizer

# What models that think write between the closing tag and the answer; without it some end there.
_BEFORE_ANSWER = "\n\n"
# Tokens that may still follow the first byte of a character in UTF-8.
_REST_OF_CHARACTER = 3


@dataclass(frozen=True)
class Ending:
    """Tokens that end a thought.

    Attributes:
        num_inside: those of them that count as its tokens, up to the closing tag's last.
    """

    token_ids: tuple[int, ...]
    num_inside: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> "Ending":
        """Errors: RequestError where the tokenizer cannot write the closing tag."""
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        thought = Thought(Phase.INSIDE)
        for token_id in token_ids:
            thought = thought.after(tokenizer.shown_bytes(token_id))
        if thought.phase is not Phase.BEHIND:
            raise RequestError(f"this model's tokenizer cannot write {CLOSE}; set no budget")
        return cls(token_ids, thought.num_tokens)


class ThoughtTokens:
    """The tokens that begin and end thoughts, in one tokenizer.

    Attributes:
        opening: the opening tag.
        closing: the closing tag, and the empty line before the answer.
        ending: the same behind the text that leads to it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.opening = tuple(tokenizer.encode(OPEN, add_special_tokens=False))
        self.closing = Ending.of(tokenizer, CLOSE + _BEFORE_ANSWER)
        self.ending = Ending.of(tokenizer, WRAP_UP + CLOSE + _BEFORE_ANSWER)

    @property
    def are_tokens(self) -> bool:
        """Whether each tag is one token, as in models that were trained to think."""
        return len(self.opening) == self.closing.num_inside == 1

    def shown_bytes(self, token_id: int) -> bytes:
        """The text of a token as completions show it."""
        return self._tokenizer.shown_bytes(token_id)

    @cached_property
    def openers(self) -> tuple[tuple[int, bytes], ...]:
        """The tokens that may make an opening tag whole, with their bytes.

        Time: a look at every token, 0.2 s for 150,000, once.
        """
        tag, found = OPEN.encode(), []
        for token_id in range(self._tokenizer.vocab_size):
            token = self.shown_bytes(token_id)
            head = token[: token.find(tag[-1:]) + 1]
            if head and (tag.endswith(head) or head.endswith(tag)):
                found.append((token_id, token))
        return tuple(found)

    def least(self, start: Thought) -> int:
        """The fewest tokens that a thought can have that begins here."""
        is_open = start.phase is Phase.INSIDE
        return self.closing.num_inside + (0 if is_open else len(self.opening))


@dataclass(frozen=True, slots=True)
class Spent:
    """What a completion has spent of its budget so far.

    Attributes:
        num_completion: tokens of the completion.
        left: tokens by which the thought is still to be ended; none while it is free.
    """

    thought: Thought
    num_completion: int = 0
    left: tuple[int, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether the answer is free to come."""
        return self.thought.phase is Phase.BEHIND and not self.left


@dataclass(frozen=True)
class Allowance:
    """How long a thought may be; None is without a bound.

    Attributes:
        num_tokens: of all its tokens, tags and wrap-up included.
        seconds: on the ``clock``, from where its first token is sampled; what then leads it to its
            end comes on top.
    """

    num_tokens: int | None
    seconds: float | None
    clock: Callable[[], float]


class ThoughtBudget:
    """A logits processor for one sequence.

    Near the end of the budget it allows one token alone, again and again, until the thought is
    closed: the wrap-up where that takes at most half of the budget, the closing tag, and an empty
    line, which is the answer's. So that
    the wrap-up cuts no character in two, it may begin up to three tokens earlier than it must.
    Where there is no room for a whole thought, none can be opened. With seconds the row depends on
    the clock too; with tokens alone on nothing but the tokens.

    Args:
        start: where the completion begins.
    """

    def __init__(self, tokens: ThoughtTokens, start: Thought, allowance: Allowance) -> None:
        self._tokens = tokens
        self._start = start
        self._allowance = allowance
        self._began_at: float | None = None
        # Lengths of the completion when its time was first seen to be over, and when the first
        # token was forced.
        self._late_from: int | None = None
        self._forced_from: int | None = None
        # Of the last call; None where it is to be followed from the start.
        self._memo: Spent | None = None

    def has_cut(self, num_completion: int) -> bool:
        """Whether one of the completion's first tokens, so many, was forced."""
        return self._forced_from is not None and self._forced_from < num_completion

    def __call__(self, logits_V: Floats, tokens: Tokens, accepted: list[int]) -> Floats:
        """Return the row, or one that leaves a single token, or no opening tag."""
        spent = self._spent(tokens.completion_token_ids)
        for token_id in accepted:
            spent = self._after(spent, token_id)
        if spent.thought.phase is Phase.BEFORE:
            return self._unopened(logits_V, spent.thought)
        left = spent.left or self._late(spent).left
        if not left:
            return logits_V
        if self._forced_from is None or self._forced_from > spent.num_completion:
            self._forced_from = spent.num_completion
        only = np.full_like(logits_V, -np.inf)
        only[left[0]] = 0.0
        return only

    def _spent(self, token_ids: Sequence[int]) -> Spent:
        """What a completion has spent. It is followed from where the last call left it, or, where
        a step was undone that had gone further, from the start."""
        spent, length = self._memo, len(token_ids)
        if self._late_from is not None and self._late_from > length:
            self._late_from = None
        if spent is None or spent.num_completion > length:
            spent = self._with_ending(Spent(self._start))
        while spent.num_completion < length and not spent.is_over:
            spent = self._after(spent, token_ids[spent.num_completion])
        self._memo = spent
        return spent

    def _after(self, spent: Spent, token_id: int) -> Spent:
        """What is spent with one more token."""
        if spent.is_over:
            return spent
        thought = spent.thought.after(self._tokens.shown_bytes(token_id))
        count = spent.num_completion + 1
        if spent.left:
            return Spent(thought, count, spent.left[1:])
        return self._with_ending(Spent(thought, count))

    def _late(self, spent: Spent) -> Spent:
        """The same, led to its end where the time is over."""
        seconds = self._allowance.seconds
        if seconds is None or self._late_from is not None or spent.is_over:
            return spent
        now = self._allowance.clock()
        if self._began_at is None:
            self._began_at = now
        if now - self._began_at < seconds:
            return spent
        # In this order: an interrupt between the two leaves nothing that is wrong.
        self._memo = None
        self._late_from = spent.num_completion
        return self._with_ending(spent)

    def _with_ending(self, spent: Spent) -> Spent:
        """The same, with the tokens that end the thought where it must end now."""
        if spent.thought.phase is not Phase.INSIDE:
            return spent
        ending, num_spare = self._ending(spent.thought)
        if self._late_from is not None and spent.num_completion >= self._late_from:
            num_late = spent.num_completion - self._late_from
            num_spare = min(num_spare, _REST_OF_CHARACTER - num_late)
        is_whole = not spent.thought.partial
        if num_spare <= 0 or (num_spare <= _REST_OF_CHARACTER and is_whole):
            return replace(spent, left=ending.token_ids)
        return spent

    def _ending(self, thought: Thought) -> tuple[Ending, float]:
        """What ends a thought, and how many free tokens there may be before it."""
        tokens, most = self._tokens, self._allowance.num_tokens
        if most is None:
            return tokens.ending, np.inf
        room = most - thought.num_tokens
        length = tokens.ending.num_inside
        ending = tokens.ending if 2 * length <= most and length <= room else tokens.closing
        return ending, room - ending.num_inside

    def _unopened(self, logits_V: Floats, thought: Thought) -> Floats:
        """The row without tokens that would open a thought there is no room for.

        Errors: RequestError where the form of the answer leaves no others.
        """
        most = self._allowance.num_tokens
        if most is None or thought.num_held + 1 + self._tokens.closing.num_inside <= most:
            return logits_V
        opened = [(one, thought.after(token)) for one, token in self._tokens.openers]
        banned = [one for one, after in opened if after.num_tokens]
        if not banned:
            return logits_V
        row_V = logits_V.copy()
        row_V[banned] = -np.inf
        if row_V.max() == -np.inf and logits_V.max() > -np.inf:
            raise RequestError(f"the form of the answer has {OPEN}, for which there is no budget")
        return row_V
