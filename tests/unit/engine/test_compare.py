"""Two tiny models over one text: windows, budgets, vocabularies, and the numbers of a reference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.arrays import log_softmax
from tests.checkpoints import GgufOptions, GgufTokenizer, tiny_config, write_gguf_model
from tests.engines import engine_of, logits_of
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import EngineSettings
from thinslice.engine import compare
from thinslice.engine.compare import CompareSettings, ModelPair, cut_windows, load_pair, plan_pair
from thinslice.engine.divergence import Divergence, scoring_bytes
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model
from thinslice.errors import BudgetError, ConfigError, RequestError
from thinslice.memory.meter import current_rss_bytes
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import BYTE_TO_CHARACTER, load_tokenizer
from thinslice.units import GIB, MIB, parse_bytes

_JITTER = 8 * MIB
_SLICE_BYTES = 8192
TEXT = "Two ducks swim past three geese; " * 12


def write_model(path: Path, seed: int = 1, last: str = "th", dtype: str = "F32") -> Path:
    """A model over bytes, ``last`` and an end token; ``seed`` decides its weights."""
    config = tiny_config(vocab_size=258, bos_token_id=257, eos_token_id=257)
    tokenizer = GgufTokenizer(
        tokens=(*BYTE_TO_CHARACTER, last, "<|end|>"),
        merges=(" ".join(last),),
        token_types=(*[1] * 257, 3),
        pre="smollm",
    )
    options = GgufOptions(dtype=dtype, tokenizer=tokenizer)
    write_gguf_model(path, shape_from_config(config), seed, options)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "a.gguf"))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "b.gguf", dtype="Q4_0"))


def settings_of(a: str, b: str, **changes: object) -> CompareSettings:
    fixed = {"memory": "3GiB", "context": 100, "dtype_a": "float32", "dtype_b": "float32"}
    return CompareSettings(a, b, **{**fixed, **changes})  # type: ignore[arg-type]


def compared(settings: CompareSettings) -> Divergence:
    pair, windows = load_pair(settings, TEXT)
    try:
        return pair.compare(windows)
    finally:
        pair.close()


def test_windows_hold_every_token_and_score_all_but_the_first() -> None:
    windows = cut_windows(range(10), (), 4, None)
    assert windows.token_ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (windows.first_scored, windows.num_scored, windows.num_used) == (1, 7, 10)


def test_windows_begin_with_bos_where_prompts_do() -> None:
    windows = cut_windows(range(10), (99,), 4, None)
    assert windows.token_ids == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8], [99, 9]]
    assert (windows.first_scored, windows.num_scored, windows.num_used) == (1, 10, 10)


def test_a_last_token_with_nothing_before_it_is_not_used_and_that_is_told() -> None:
    windows = cut_windows(range(10), (), 3, None)
    assert windows.token_ids[-1] == [6, 7, 8]
    assert (windows.num_text_tokens, windows.num_used, windows.num_scored) == (10, 9, 6)
    assert cut_windows(range(10), (), 3, 5).token_ids == [[0, 1, 2], [3, 4]]
    assert cut_windows(range(10), (), 3, 5).num_used == 5


def test_refused_windows() -> None:
    for text in ((), (1,), (1, 2)):
        with pytest.raises(RequestError, match="at least 3"):
            cut_windows(text, (), 4, None)
    with pytest.raises(ConfigError, match="--context 2 leaves no token to predict; 3 do"):
        cut_windows(range(10), (98, 99), 2, None)
    with pytest.raises(ConfigError, match="--context 1"):
        CompareSettings("a", "b", context=1)
    with pytest.raises(ConfigError, match="--tokens 1"):
        CompareSettings("a", "b", num_tokens=1)
    with pytest.raises(ConfigError, match="dtype 'half' is unknown"):
        CompareSettings("a", "b", dtype_b="half").of_each()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_against_itself_differs_in_nothing(model: str, dtype: str) -> None:
    same = compared(settings_of(model, model, dtype_a=dtype, dtype_b=dtype))
    assert same.kl_max == same.kl.mean == same.log_ratio.mean == 0.0
    assert same.same_top.mean == 1.0


def reference(a: str, b: str, context: int, shift: int = 0) -> tuple[float, float]:
    """Mean KL and perplexity of B from whole windows' logits at once.

    ``shift`` plants a fault: how far the token that is predicted lies from its place.
    """
    engines = [engine_of(open_checkpoint(Path(path)), "float32", context) for path in (a, b)]
    ids = load_tokenizer(open_checkpoint(Path(a))).encode(TEXT, add_special_tokens=False)
    kl, nll = [], []
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        of_a, of_b = (log_softmax(logits_of(e, window))[:-1] for e in engines)
        kl.append((np.exp(of_a) * (of_a - of_b)).sum(-1))
        next_ids = np.roll(window[1:], shift)
        nll.append(-of_b[np.arange(len(next_ids)), next_ids])
    return float(np.concatenate(kl).mean()), float(np.exp(np.concatenate(nll).mean()))


@pytest.mark.parametrize("context", [100, 30])
def test_the_numbers_are_those_of_whole_windows_at_once(
    model: str, quantised: str, context: int
) -> None:
    found = compared(settings_of(model, quantised, context=context))
    numbers = pytest.approx((found.kl.mean, found.perplexity_b.mean), rel=1.3e-6, abs=1e-5)
    assert found.kl.mean > 1e-3
    assert reference(model, quantised, context) == numbers
    for fault in (
        reference(model, quantised, context, shift=1),
        reference(quantised, model, context),
        reference(model, quantised, context + 1),
    ):
        assert fault != numbers


def streamed(engine: Engine, path: str) -> Engine:
    """The same model with every other slice read in at each use."""
    checkpoint = open_checkpoint(Path(path))
    count = len(Model.of(checkpoint).layout("float32").slices(_SLICE_BYTES))
    streaming = StreamingPlan(_SLICE_BYTES, count, count // 2, 3, buffer_bytes=5 * 4096)
    return load_engine(checkpoint, replace(engine.plan, streaming=streaming), frozenset())


def test_streamed_weights_give_the_same(model: str, quantised: str) -> None:
    """In chunks of a tile, since the head's slices pass by once in a sweep."""
    resident, windows = load_pair(settings_of(model, quantised), TEXT)
    pair = ModelPair(streamed(resident.a, model), streamed(resident.b, quantised), GIB)
    try:
        assert pair.chunk == compare.TILE < resident.chunk
        found, expected = pair.compare(windows), resident.compare(windows)
    finally:
        pair.close()
    assert found.kl.mean == pytest.approx(expected.kl.mean, rel=1.3e-6, abs=1e-5)
    assert found.num_scored == expected.num_scored


def test_other_vocabularies_are_refused(model: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", last="he")
    with pytest.raises(RequestError, match=r"token 256 is b'th' to A and b'he' to B"):
        load_pair(settings_of(model, str(other)), TEXT)


def test_what_must_be_packed_first_is_packed_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path))
    settings = replace(settings_of(model, model), dtype_b="int8")
    for _ in range(2):
        pair, windows = load_pair(settings, TEXT)
        assert pair.b.plan.dtype == "int8"
        assert 0 < pair.compare(windows).kl.mean < 0.01
        pair.close()
    assert len(list((tmp_path / "models" / "packed").glob("*-int8"))) == 1


def test_too_few_tokens_of_a_text_that_has_more_are_told_as_such(model: str) -> None:
    with pytest.raises(RequestError, match="--tokens 2 is too few; at least 3"):
        load_pair(replace(settings_of(model, model), num_tokens=2), TEXT)


def test_a_text_too_short_is_refused(model: str) -> None:
    with pytest.raises(RequestError, match="--text has 1 of at least 3 tokens"):
        load_pair(settings_of(model, model), "a")


def test_progress_names_both_models_and_counts_tokens(model: str) -> None:
    told: list[tuple[str, int, int]] = []
    settings = settings_of(model, model, num_tokens=150)
    pair, windows = load_pair(settings, TEXT, lambda *what: told.append(what))
    pair.compare(windows, lambda *what: told.append(what))
    assert {what for what, _, _ in told} == {
        "loading weights of A",
        "loading weights of B",
        "comparing",
    }
    assert told[-1] == ("comparing", 148, 148)
    assert windows.num_used == 150


def test_both_plans_fit_the_budget_together_and_the_suggestion_works(model: str) -> None:
    models = [Model.of(open_checkpoint(Path(model)))] * 2
    settings = [EngineSettings(context=256, dtype="float32", max_num_seqs=1)] * 2
    runtime = current_rss_bytes()
    scoring = scoring_bytes(258, compare.TILE)
    plans = plan_pair(models, settings, 3 * GIB)
    together = sum(plan.peak_bytes for plan in plans) - runtime + scoring
    assert together < 3 * GIB
    # What the larger one was given is all that the other one leaves.
    assert plans[0].budget_bytes + plans[1].peak_bytes > 3 * GIB
    with pytest.raises(BudgetError, match="both models in --memory 10MiB at --context 256") as told:
        plan_pair(models, settings, 10 * MIB)
    suggested = str(told.value).split("--memory ")[-1].removesuffix(" does")
    assert parse_bytes(suggested) < together + 3 * _JITTER
    plan_pair(models, settings, parse_bytes(suggested))
