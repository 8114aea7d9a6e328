"""Two versions of a model in one process and one budget, run over the same text side by side."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from thinslice.config import Dtype, EngineSettings, KvDtype, SamplingParams
from thinslice.engine.divergence import Divergence, DivergenceMeter, scoring_bytes
from thinslice.engine.draws import Draws
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model, fit_model, plan_model
from thinslice.engine.prepare import Opened, open_model, packed_copy, with_budget
from thinslice.engine.scheduler import ScheduledTokens
from thinslice.engine.sequence import Sequence as TokenSequence
from thinslice.errors import BudgetError, ConfigError, RequestError
from thinslice.kernels.arrays import Floats
from thinslice.memory.ledger import ledger
from thinslice.memory.meter import current_rss_bytes
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.plan.refusal import JITTER_BYTES
from thinslice.store.progress import Progress
from thinslice.text.tokenizer import Tokenizer
from thinslice.units import MIB, size_option

# Rows whose logits exist at once.
TILE = 64
# llama.cpp's default for its perplexity tool.
DEFAULT_CONTEXT = 512
# Of what is asked for more, so that the suggestion still fits the next time.
_MOST_MEMORY = 1 << 50


@dataclass(frozen=True)
class CompareSettings:
    """What is compared and how.

    Attributes:
        a, b: names of the models; A is the reference.
        memory: the budget for both together; None takes a share of what is free.
        context: positions of a window.
        num_tokens: the most tokens of the text that are used; None uses all.
        dtype_a, dtype_b: weight type of each.
        kv_dtype_a, kv_dtype_b: KV cache type of each.
        offline: use no network.

    Errors: ConfigError for a value out of range.
    """

    a: str
    b: str
    memory: str | int | None = None
    context: int = DEFAULT_CONTEXT
    num_tokens: int | None = None
    dtype_a: Dtype = "auto"
    dtype_b: Dtype = "auto"
    kv_dtype_a: KvDtype = "auto"
    kv_dtype_b: KvDtype = "auto"
    offline: bool = False

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ConfigError(f"--context {self.context} leaves no token to predict; at least 2")
        if self.num_tokens is not None and self.num_tokens < 2:
            raise ConfigError(f"--tokens {self.num_tokens} is too few; at least 2")

    def of_each(self) -> tuple[EngineSettings, EngineSettings]:
        """The settings each model is loaded with, both with the whole budget."""
        common = EngineSettings(
            memory=self.memory,
            context=self.context,
            max_num_seqs=1,
            draft="off",
            offline=self.offline,
        )
        return (
            replace(common, dtype=self.dtype_a, kv_dtype=self.kv_dtype_a),
            replace(common, dtype=self.dtype_b, kv_dtype=self.kv_dtype_b),
        )


@dataclass(frozen=True)
class Windows:
    """A text cut into windows, each of them run without what came before it.

    Attributes:
        token_ids: of each window: the model's prompt prefix (BOS, where it has one) and a run of
            the text's tokens. The last window may be shorter than the others.
        first_scored: position from which on a window's tokens are scored: each token of the text
            but those at position 0, which nothing precedes.
        context: positions of a whole window.
        num_text_tokens: tokens of the whole text.
        num_used: tokens of the text that the windows hold.
    """

    token_ids: list[list[int]]
    first_scored: int
    context: int
    num_text_tokens: int
    num_used: int

    @property
    def num_scored(self) -> int:
        """Tokens whose prediction is scored."""
        return sum(len(window) - self.first_scored for window in self.token_ids)


def cut_windows(
    text_ids: Sequence[int], prefix_ids: Sequence[int], context: int, num_tokens: int | None
) -> Windows:
    """Cut the first ``num_tokens`` of a text into windows of ``context`` positions.

    Errors: ConfigError for a context that the prefix fills; RequestError for a text of fewer than
    two tokens to score.
    """
    first_scored = max(len(prefix_ids), 1)
    step = context - len(prefix_ids)
    if context <= first_scored:
        raise ConfigError(f"--context {context} leaves no token to predict; {first_scored + 1} do")
    used_ids = text_ids[:num_tokens]
    pieces = [used_ids[start : start + step] for start in range(0, len(used_ids), step)]
    token_ids = [[*prefix_ids, *piece] for piece in pieces]
    # A last token alone at position 0 has nothing to be predicted from.
    if token_ids and len(token_ids[-1]) == first_scored:
        used_ids = used_ids[: -len(pieces[-1])]
        token_ids.pop()
    windows = Windows(token_ids, first_scored, context, len(text_ids), len(used_ids))
    if windows.num_scored < 2:
        needed = 2 if prefix_ids else 3
        if len(text_ids) >= needed:
            raise RequestError(f"--tokens {num_tokens} is too few; at least {needed}")
        raise RequestError(f"--text has {len(text_ids)} of at least {needed} tokens")
    return windows


class ModelPair:
    """Both models, loaded.

    Attributes:
        a, b: the engines; ``a`` is the reference.
        budget_bytes: what both share.
        notes: what a user should know of the files of each, one line each.
    """

    def __init__(
        self, a: Engine, b: Engine, budget_bytes: int, notes: tuple[str, ...] = ()
    ) -> None:
        self.a = a
        self.b = b
        self.budget_bytes = budget_bytes
        self.notes = notes
        chunk = min(a.plan.chunk, b.plan.chunk)
        streams = any(engine.plan.streaming is not None for engine in (a, b))
        # The same chunks for both give the same tiles, and equal models equal bits. Streamed
        # weights pass by once in a sweep, the head's for one tile.
        self.chunk = min(chunk, TILE) if streams else chunk

    def close(self) -> None:
        """Stop reading weights."""
        self.a.runner.close()
        self.b.runner.close()

    def compare(self, windows: Windows, progress: Progress | None = None) -> Divergence:
        """Run both over every window and score each token that has one before it.

        ``progress`` is called with the tokens scored so far and in all.
        Errors: CheckpointError for a model whose logits are not numbers.
        """
        done, total = 0, windows.num_scored
        meter = DivergenceMeter(total)
        for window in windows.token_ids:
            for start, logits_a, logits_b in self._tiles(window):
                # Row i predicts token i + 1.
                skipped = max(windows.first_scored - 1 - start, 0)
                next_ids = np.array(window[start + 1 : start + 1 + len(logits_a)])
                meter.add(logits_a[skipped:], logits_b[skipped:], next_ids[skipped:])
                done += max(len(next_ids) - skipped, 0)
                if progress is not None:
                    progress("comparing", done, total)
        return meter.result()

    def _tiles(self, window: list[int]) -> Iterator[tuple[int, Floats, Floats]]:
        """First row and both models' logits of each tile of a window, its last row left out."""
        start = 0
        with _sequence(self.a, window[:-1]) as one, _sequence(self.b, window[:-1]) as other:
            pairs = zip(
                _logits(self.a, one, self.chunk), _logits(self.b, other, self.chunk), strict=True
            )
            for logits_a, logits_b in pairs:
                yield start, logits_a, logits_b
                start += len(logits_a)
                del logits_a, logits_b  # before the next pair is made


def load_pair(
    settings: CompareSettings, text: str, progress: Progress | None = None
) -> tuple[ModelPair, Windows]:
    """Load both models, fetching what is not there, and cut the text by A's tokenizer.

    Peak memory: the budget; both plans are made before either model is loaded.
    Errors: ConfigError, StoreError, CheckpointError, BudgetError; RequestError for models of
    different vocabularies and for a text too short.
    """
    each = settings.of_each()
    names = (settings.a, settings.b)
    total = with_budget(each[0])[1].num_bytes
    # Whether a model must be packed to be streamed is decided for about what it will get.
    held = current_rss_bytes()
    halves = [replace(one, memory=held + max(total - held, 0) // 2) for one in each]
    opened = [_opened(*one, progress) for one in zip(names, halves, strict=True)]
    tokenizer = opened[0].tokenizer
    check_same_vocabulary(tokenizer, opened[1].tokenizer)
    text_ids = tokenizer.encode(text, add_special_tokens=False)
    prefix_ids = tokenizer.special.prompt_prefix_ids
    windows = cut_windows(text_ids, prefix_ids, settings.context, settings.num_tokens)
    models = [Model.of(one.checkpoint, one.took) for one in opened]
    plans = plan_pair(models, each, total)
    engines = []
    for one, chosen, name in zip(opened, plans, "AB", strict=True):
        report = progress and partial(_named, progress, name)
        engines.append(load_engine(one.checkpoint, chosen, frozenset(), report))
    notes = [
        f"{name}: {note}"
        for name, one in zip("AB", opened, strict=True)
        for note in (*one.checkpoint.notes, *one.tokenizer.notes)
    ]
    return ModelPair(engines[0], engines[1], total, tuple(notes)), windows


def _opened(name: str, settings: EngineSettings, progress: Progress | None) -> Opened:
    """A model's files; those of its packed copy where it needs one."""
    opened = open_model(name, settings, progress)
    model = Model.of(opened.checkpoint, opened.took)
    if model.packed_copy is not None or model.needs_packing(settings.dtype):
        found = fit_model(model, settings)
        if found.is_to_be_packed:
            packed = packed_copy(opened.checkpoint, found, settings, progress)
            return replace(opened, checkpoint=packed)
    return opened


def check_same_vocabulary(a: Tokenizer, b: Tokenizer) -> None:
    """Errors: RequestError where an id is not the same text to both."""
    if a.vocab_size != b.vocab_size:
        raise RequestError(
            f"the vocabularies differ: A has {a.vocab_size} tokens, B has {b.vocab_size}; "
            "only versions of one model can be compared"
        )
    for token_id in range(a.vocab_size):
        of_a, of_b = a.token_bytes(token_id), b.token_bytes(token_id)
        if of_a != of_b:
            raise RequestError(
                f"the vocabularies differ: token {token_id} is {of_a!r:.40} to A and "
                f"{of_b!r:.40} to B; only versions of one model can be compared"
            )


def plan_pair(
    models: Sequence[Model], settings: Sequence[EngineSettings], total: int
) -> tuple[MemoryPlan, MemoryPlan]:
    """Plans that fit a budget together: half for each, and what one leaves goes to the other.

    Logits of a tile and their scoring are kept free of it.
    Errors: ConfigError; BudgetError with the memory that would do.
    """
    plans = _try_plan_pair(models, settings, total)
    if plans is None:
        need = _memory_that_fits(models, settings, total)
        raise BudgetError(
            f"no plan fits both models in --memory {size_option(total)} at --context "
            f"{settings[0].context}; --memory {size_option(need)} does"
        )
    return plans


def _try_plan_pair(
    models: Sequence[Model], settings: Sequence[EngineSettings], total: int
) -> tuple[MemoryPlan, MemoryPlan] | None:
    runtime = ledger().promised_bytes() + current_rss_bytes()
    vocab_size = max(model.shape.vocab_size for model in models)
    half = (total - runtime - scoring_bytes(vocab_size, TILE)) // 2
    if half <= 0:
        return None
    # What the process holds already is part of every plan, so each gets it on top of its half.
    each = [replace(one, memory=runtime + half) for one in settings]
    try:
        first, second = (
            plan_model(model, one, runtime) for model, one in zip(models, each, strict=True)
        )
    except BudgetError:
        return None
    if first.headroom_bytes > second.headroom_bytes:
        more = replace(each[1], memory=runtime + half + first.headroom_bytes)
        return first, plan_model(models[1], more, runtime)
    more = replace(each[0], memory=runtime + half + second.headroom_bytes)
    return plan_model(models[0], more, runtime), second


def _memory_that_fits(
    models: Sequence[Model], settings: Sequence[EngineSettings], too_little: int
) -> int:
    """The least memory that both fit in, to a MiB, found by planning again."""
    low = high = max(too_little // MIB, 1)
    while _try_plan_pair(models, settings, high * MIB) is None:
        low, high = high, high * 2
        assert high * MIB < _MOST_MEMORY, "no memory is enough"
    while high - low > 1:
        middle = (low + high) // 2
        if _try_plan_pair(models, settings, middle * MIB) is None:
            low = middle
        else:
            high = middle
    return high * MIB + JITTER_BYTES


@contextmanager
def _sequence(engine: Engine, token_ids: list[int]) -> Iterator[TokenSequence]:
    """A sequence of these tokens that holds blocks of the KV cache, outside any schedule."""
    count, blocks = len(token_ids), engine.scheduler.blocks
    sequence = TokenSequence(0, token_ids, SamplingParams(), count, Draws(0))
    blocks.take_prefix(sequence)
    assert blocks.grow(sequence, count), f"no blocks for {count} tokens"
    try:
        yield sequence
    finally:
        blocks.release(sequence)


def _logits(engine: Engine, sequence: TokenSequence, chunk: int) -> Iterator[Floats]:
    """Logits of every token of a sequence, tile by tile."""
    while sequence.num_uncomputed:
        tokens = ScheduledTokens(sequence, min(sequence.num_uncomputed, chunk))
        yield from engine.runner.all_logits(tokens, TILE)
        sequence.num_computed += tokens.count


def _named(progress: Progress, name: str, what: str, done: int, total: int) -> None:
    """Progress of one of the two."""
    progress(f"{what} of {name}", done, total)
