"""Grammars: what a constraint allows next, token by token, by llguidance.

A grammar is compiled once and shared; each sequence follows it with a matcher of its own. Nothing
large is made before there is room for it in the plan.
"""

import re
import threading
import weakref
from collections import OrderedDict
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from thinslice.config import about
from thinslice.engine.processors import Tokens
from thinslice.engine.results import Held, ResultsRoom
from thinslice.errors import BusyError, ConfigError, RequestError, plain
from thinslice.forks import fork_safe, fork_waits, is_mine
from thinslice.kernels.arrays import Floats
from thinslice.plan.cost import vocabulary_bytes
from thinslice.text.tokenizer import Tokenizer
from thinslice.units import KIB, format_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Of a grammar, by the bytes of its text; the largest that was measured is 320.
_GRAMMAR_BYTES_PER_BYTE = 320
# Its automaton's states, which all who follow it share and which come with the texts. Documents of
# common schemas take 200 to 500; the largest that were measured are 2.8 KiB.
_STATES = 1024
_GRAMMAR_BYTES = 128 * KIB + _STATES * 3 * KIB
# What a matcher keeps of each token of a text, to go back.
_BYTES_PER_FOLLOWED = 512
_MATCHER_BYTES = 256 * KIB
_MAX_GRAMMARS = 8
# Tokens that may stand within a JSON text are looked at together: of 49,152 in 0.03 ms and not in
# 0.4, for half as much memory again.
_SLICE = r'[^"\\\x00-\x1F\x7F]{1,30}'
_WHAT = "an answer of a given form"
# Where in a grammar an error is; the grammar is ours.
_PLACE = re.compile(r"^at \d+\(\d+\): ")
# What the library advises is nothing that a schema can set.
_ONE_OF = (
    "Enable 'coerce_one_of' option to approximate oneOf with anyOf",
    "Its branches have to exclude each other by type, const or a required property that has one; "
    "or use anyOf",
)
MISSING = (
    "an answer's form needs the package llguidance: pip install 'thinslice[grammar]' "
    "(thinslice[serve] has it too)"
)


class Vocabulary:
    """A tokenizer's tokens as the library wants them, made at the first use.

    Its text is never encoded: grammars here force nothing.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.token_bytes(one) for one in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids | end_ids(tokenizer))
        self.eos_token_id = min(end_ids(tokenizer))

    def __call__(self, text: str | bytes) -> list[int]:
        """The library asks for nothing."""
        raise NotImplementedError


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer and that the model can write."""
    return frozenset(one for one in tokenizer.special.eos_token_ids if one < tokenizer.vocab_size)


class Grammar:
    """A compiled grammar.

    Args:
        matcher: at the beginning; it stays there.
        ends: tokens that end an answer.
        taken_bytes: of the room for answers, by the grammar itself and the vocabulary.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        ends: frozenset[int],
        results: ResultsRoom,
        taken_bytes: int,
    ) -> None:
        self._matcher = matcher
        self._taken_bytes = taken_bytes
        self.ends = ends
        self._end_ids = np.array(sorted(ends), dtype=np.intp)
        self._results = results
        self._row: Floats = np.empty(0, np.float32)

    def check_count(self, count: int) -> None:
        """Errors: RequestError for more completions at once than the plan ever has room for."""
        num_bytes = count * _MATCHER_BYTES
        most = max(self._results.most_bytes - self._taken_bytes, 0)
        if num_bytes > most:
            told = (
                f"{count} completions of a given form take {format_bytes(num_bytes)} and the plan "
                f"leaves {format_bytes(most)}: at most {most // _MATCHER_BYTES} fit"
            )
            raise about("n", RequestError(told))

    def follower(self) -> "Follower":
        """What holds one completion to it.

        Errors: BusyError where the plan has no room for it.
        """
        held = Held(self._results)
        held.need(_MATCHER_BYTES, _WHAT)
        follower = Follower(self, held)
        weakref.finalize(follower, held.release).atexit = False
        return follower

    def begin(self) -> "LLMatcher":
        """A matcher of a completion's own."""
        return self._matcher.deep_copy()

    def masked(self, logits_V: Floats, allowed: NDArray[np.bool_]) -> Floats:
        """The row with -inf for what is not allowed; the next one takes its place.

        In memory of its own: a new row each time would be mapped and given back.
        """
        if len(self._row) != len(logits_V):
            self._row = np.empty_like(logits_V)
        self._row.fill(-np.inf)
        np.copyto(self._row, logits_V, where=allowed)
        return self._row

    def allowed(self, matcher: "LLMatcher", size: int) -> NDArray[np.bool_]:
        """Whether each token may follow, [V]: an end exactly where the grammar accepts."""
        packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
        if not matcher.is_accepting():
            bits[self._end_ids] = False
        _check(matcher, "the form of the answer cannot be followed any further")
        return bits


class Follower:
    """A logits processor: tokens that the grammar does not allow next become impossible.

    It follows whatever the completion is: where tokens that it has seen are taken back, rejected
    drafts or an undone step, it goes back as far.

    Args:
        held: room for what it keeps of each token.
    """

    def __init__(self, grammar: Grammar, held: Held) -> None:
        self._grammar = grammar
        self._held = held
        self._num_held = 0
        self._matcher: LLMatcher | None = None
        self._seen: list[int] | None = None

    def __call__(self, logits_V: Floats, tokens: Tokens, accepted: list[int]) -> Floats:
        """Return the row with -inf for what is not allowed, good until the next call.

        Errors: RequestError where the grammar cannot be followed within its bounds; BusyError where
        the plan has no more room.
        """
        if not self._grammar.ends.isdisjoint(accepted):
            return logits_V  # behind the end: whoever asks cuts it off
        matcher = self._at([*tokens.completion_token_ids, *accepted])
        allowed = self._grammar.allowed(matcher, len(logits_V))
        masked = self._grammar.masked(logits_V, allowed)
        if masked.max() == -np.inf and logits_V.max() > -np.inf:
            raise RequestError("no token of the model goes on in the form of the answer")
        return masked

    def _at(self, wanted: list[int]) -> "LLMatcher":
        """The matcher behind these tokens. What is interrupted here is begun anew."""
        matcher, seen = self._matcher, self._seen
        if matcher is None or seen is None:
            matcher, seen = self._grammar.begin(), []
            self._matcher = matcher
        self._seen = None
        if len(wanted) > self._num_held:
            more, self._num_held = len(wanted) - self._num_held, len(wanted)
            self._held.use(_BYTES_PER_FOLLOWED * more, _WHAT)
        kept = _num_same(seen, wanted)
        if kept < len(seen):
            matcher.rollback(len(seen) - kept)
        if kept < len(wanted):
            matcher.consume_tokens(wanted[kept:])
        _check(matcher, "the text so far is not of the form of the answer")
        self._seen = wanted
        return matcher


class Grammars:
    """Compiles the grammars of one model and keeps the last few.

    Safe in any thread; one grammar is compiled at a time.

    Args:
        reserved_bytes: what the plan has for the vocabulary; what that takes more, and all else, is
            of the room for answers.
    """

    def __init__(self, tokenizer: Tokenizer, results: ResultsRoom, reserved_bytes: int = 0) -> None:
        self._tokenizer = tokenizer
        self._results = results
        self._reserved_bytes = reserved_bytes
        self._held = Held(results)  # for the vocabulary
        self._vocabulary_bytes = 0
        self._vocabulary: LLTokenizer | None = None
        self._limits: LLParserLimits | None = None
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()
        self._is_let_go = False
        self._lock = fork_safe(threading.RLock())

    def compiled(self, text: str) -> Grammar:
        """The grammar of ``lark.grammar_of``'s text.

        Errors: ConfigError where the library is missing; RequestError for a text that is no
        grammar, or too large, and where the plan has no room for it; BusyError in the middle of
        another one of the same thread: in a signal handler.
        """
        if is_mine(self._lock):
            raise BusyError("the form of an answer is compiled at this moment; ask after that")
        key = sha256(text.encode(errors="surrogatepass")).digest()
        try:
            with self._lock:
                found = self._kept.get(key)
                if found is None:
                    found = self._compile(text)
                    self._kept[key] = found
                self._kept.move_to_end(key)
                while len(self._kept) > _MAX_GRAMMARS:
                    self._kept.popitem(last=False)
                return found
        finally:
            self._forget()

    def let_go(self) -> None:
        """Forget all of it: the model is closed. In a signal handler in the middle of a compilation
        that is put off to its end."""
        self._is_let_go = True
        self._forget()

    def _forget(self) -> None:
        while self._is_let_go and not is_mine(self._lock):
            with self._lock:
                self._kept.clear()
                self._vocabulary, self._vocabulary_bytes = None, 0
                self._held.release()
                self._held = Held(self._results)
                self._is_let_go = False  # last: what is interrupted is done again

    def _compile(self, text: str) -> Grammar:
        vocabulary, limits = self._ready()
        from llguidance import LLMatcher

        held = Held(self._results)
        row_bytes = 4 * self._tokenizer.vocab_size
        num_bytes = _GRAMMAR_BYTES + row_bytes + _GRAMMAR_BYTES_PER_BYTE * len(text)
        while not held.take(num_bytes):
            if not self._kept:
                raise self._no_room(num_bytes, "this form of an answer")
            self._kept.popitem(last=False)
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)
        taken = num_bytes + self._vocabulary_bytes
        grammar = Grammar(matcher, end_ids(self._tokenizer), self._results, taken)
        weakref.finalize(grammar, held.release).atexit = False
        _check(matcher, "no grammar can be made of the form of the answer")
        return grammar

    def _ready(self) -> "tuple[LLTokenizer, LLParserLimits]":
        if self._vocabulary is not None and self._limits is not None:
            return self._vocabulary, self._limits
        if find_spec("llguidance") is None:
            raise ConfigError(MISSING)
        tokenizer = self._tokenizer
        if not end_ids(tokenizer):
            raise RequestError("the model's files name no end token, so no answer can end in form")
        size = tokenizer.vocab_size
        text_bytes = sum(len(tokenizer.token_bytes(one)) for one in range(size))
        num_bytes = max(vocabulary_bytes(size, text_bytes) - self._reserved_bytes, 0)
        # Before the library is imported: that takes some of it.
        if not self._held.take(num_bytes):
            raise self._no_room(num_bytes, "the vocabulary of answers of a given form")
        try:
            made, self._limits = _made(tokenizer)
        except BaseException:
            self._held.release()
            self._held = Held(self._results)
            raise
        self._vocabulary, self._vocabulary_bytes = made, num_bytes
        return made, self._limits

    def _no_room(self, num_bytes: int, what: str) -> RequestError:
        """What is said: BusyError where answers that are held now have the room."""
        told = (
            f"{what} may take {format_bytes(num_bytes)}, and the plan leaves "
            f"{format_bytes(self._results.left_bytes)}"
        )
        if num_bytes <= self._results.most_bytes - self._vocabulary_bytes:
            return BusyError(f"{told} beside the answers that are held now: try again later")
        return RequestError(f"{told}: a smaller --context or a larger --memory leaves room")


def _made(tokenizer: Tokenizer) -> "tuple[LLTokenizer, LLParserLimits]":
    """The vocabulary as the library has it, and the bounds of every grammar."""
    ends, size = sorted(end_ids(tokenizer)), tokenizer.vocab_size
    with fork_waits:
        from llguidance import LLParserLimits, LLTokenizer

        made = LLTokenizer(Vocabulary(tokenizer), n_vocab=size, eos_token=ends, slices=[_SLICE])  # type: ignore[arg-type]
        limits = LLParserLimits(
            max_lexer_states=_STATES, precompute_large_lexemes=False, verbose_errors=False
        )
    return made, limits


def _check(matcher: "LLMatcher", what: str) -> None:
    """Errors: RequestError with what the library says."""
    if matcher.is_error():
        first, *more = matcher.get_error().split("\n")
        reasons = [one.strip() for one in more if one.startswith("error: ")]
        told = " ".join([_PLACE.sub("", first), *reasons]).replace(*_ONE_OF)
        raise RequestError(f"{what}: {plain(told, 300)}")


def _num_same(seen: list[int], wanted: list[int]) -> int:
    """How many tokens both begin with."""
    count = min(len(seen), len(wanted))
    if seen[:count] == wanted[:count]:
        return count
    return next(place for place in range(count) if seen[place] != wanted[place])
