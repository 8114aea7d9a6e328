"""Grammars: a completion is of its form whatever drafts, company and interrupts there are."""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.engines import run_all, tiny_engine
from thinslice.config import SamplingParams
from thinslice.constraint import Constraint
from thinslice.engine import grammar as module
from thinslice.engine.draft_length import DraftLength
from thinslice.engine.drafting import Drafting
from thinslice.engine.engine import Engine
from thinslice.engine.grammar import MISSING, Grammar, Grammars
from thinslice.engine.processors import LogitsProcessor
from thinslice.engine.results import ResultsRoom
from thinslice.errors import BusyError, ConfigError, RequestError
from thinslice.plan.memory_plan import DraftPlan
from thinslice.text.json_schema import for_grammar
from thinslice.text.lark import grammar_of
from thinslice.text.reasoning import Beginning

# The engine's 64 tokens; 1 ends. Some hold more than a sign, a part of one, or both of a tag.
LONGER = (b'{"', b'": "', b'", "', b"ab", b"</think>", b">\n{", b"\xe2", b"<think>")
SIGNS = [bytes([one]) for one in b'{}[]":,<>/\n -0123456789abcdehiknt']
TOKENS = [b"", b"<end>", *LONGER, *SIGNS]
TOKENS += [b""] * (64 - len(TOKENS))
DRAWN = SamplingParams(temperature=1.5, top_p=1.0, seed=3, max_tokens=40)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["ab", "cd"]}, "b": {"type": "integer", "maximum": 99}},
    "required": ["a", "b"],
}
FORMS = {
    "regex": Constraint.regex(r"(ab|c){2,6}-\d{3}"),
    "choice": Constraint.choice(["abc", "abd", "12"]),
    "schema": Constraint.json_schema(SCHEMA),
    "grammar": Constraint.grammar('start: "a" inner "b"\ninner: "c"{1,3} | start'),
}
PROMPT = [3, 9, 27, 3, 9, 27, 3, 9]


class Room(ResultsRoom):
    """Room for so many bytes."""

    def __init__(self, num_bytes: int = 1 << 40) -> None:
        self.left = self.most = num_bytes

    def take(self, num_bytes: int) -> bool:
        is_there = num_bytes <= self.left
        self.left -= num_bytes * is_there
        return is_there

    def release(self, num_bytes: int) -> None:
        self.left += num_bytes

    @property
    def left_bytes(self) -> int:
        return self.left

    @property
    def most_bytes(self) -> int:
        return self.most


def tokenizer(ends: frozenset[int] = frozenset({1})) -> Any:
    return SimpleNamespace(
        vocab_size=64,
        token_bytes=TOKENS.__getitem__,
        special_token_ids=frozenset({1}),
        special=SimpleNamespace(eos_token_ids=ends),
    )


def compiled(form: Constraint, beginning: Beginning = "none", room: Room | None = None) -> Grammar:
    return Grammars(tokenizer(), room or Room()).compiled(grammar_of(form, None, beginning))


def held_to(grammar: Grammar) -> Callable[[], tuple[LogitsProcessor, ...]]:
    return lambda: (grammar.follower(),)


def text_of(token_ids: list[int]) -> bytes:
    return b"".join(TOKENS[one] for one in token_ids if one != 1)


def is_of(name: str, text: str) -> bool:
    if name == "regex":
        return re.fullmatch(r"(ab|c){2,6}-[0-9]{3}", text) is not None
    if name == "choice":
        return text in ("abc", "abd", "12")
    if name == "grammar":
        return re.fullmatch(r"(a+)(c{1,3})(b+)", text) is not None and text.count("a") == (
            text.count("b")
        )
    found = json.loads(text)
    return set(found) == {"a", "b"} and found["a"] in ("ab", "cd") and found["b"] <= 99


def drafting_engine() -> Engine:
    engine = tiny_engine()
    engine.drafting = Drafting(DraftPlan(uses_ngram=True, num_mtp_layers=0, length=3), None)
    return engine


@pytest.fixture
def always_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: DraftLength, num_drafting: int, num_other_rows: int = 0) -> int:
        return self.max_length if num_drafting else 0

    monkeypatch.setattr(DraftLength, "choose", choose)


def complete(engine: Engine, grammar: Grammar, params: SamplingParams) -> list[list[int]]:
    sequences = engine.add_samples(PROMPT, params, processors=held_to(grammar))
    run_all(engine)
    assert [one.error for one in sequences] == [None] * len(sequences)
    return [one.completion_token_ids for one in sequences]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.usefixtures("always_drafting")
def test_completions_are_of_their_form_with_drafts_and_without(name: str) -> None:
    grammar, num_ended = compiled(FORMS[name]), 0
    for seed in range(12):
        params = replace(DRAWN, seed=seed, temperature=0.0 if seed == 0 else 1.5)
        (plain,) = complete(tiny_engine(), grammar, params)
        assert complete(drafting_engine(), grammar, params) == [plain]
        if plain[-1] == 1:
            num_ended += 1
            assert is_of(name, text_of(plain).decode())
    assert num_ended >= 6


def test_drafts_were_accepted_and_rejected(always_drafting: None) -> None:
    engine = drafting_engine()
    complete(engine, compiled(Constraint.regex("(ab|ba|a|b){30}")), DRAWN)
    metrics = engine.metrics
    assert 0 < metrics.accepted_tokens < metrics.drafted_tokens


def test_samples_of_a_prompt_share_a_grammar_and_not_their_place_in_it() -> None:
    grammar = compiled(FORMS["regex"])
    alone = [complete(tiny_engine(), grammar, replace(DRAWN, seed=seed))[0] for seed in (3, 4, 5)]
    assert complete(tiny_engine(), grammar, replace(DRAWN, n=3)) == alone
    assert len({tuple(one) for one in alone}) > 1


def test_a_follower_agrees_with_a_fresh_one_wherever_it_was_before() -> None:
    grammar, rng = compiled(Constraint.regex('(ab|ba|a|\\{"|[0-9]{2,3}){60}')), random.Random(7)
    follower, row = grammar.follower(), np.zeros(64, np.float32)
    done: list[int] = []
    for _ in range(300):
        accepted: list[int] = []
        for _ in range(rng.randrange(4)):
            allowed = following(grammar, row, done, accepted)
            accepted.append(rng.choice(allowed))
            if accepted[-1] == 1:
                break
        tokens: Any = SimpleNamespace(completion_token_ids=done)
        got = np.flatnonzero(follower(row, tokens, accepted) == 0.0).tolist()
        assert got == following(grammar, row, done, accepted)
        done = [*done, *accepted[: rng.randrange(len(accepted) + 1)]]
        if len(done) > 30 or 1 in done:
            done = done[: rng.randrange(5)]


def following(grammar: Grammar, row: Any, done: list[int], accepted: list[int]) -> list[int]:
    tokens: Any = SimpleNamespace(completion_token_ids=done)
    found: list[int] = np.flatnonzero(grammar.follower()(row, tokens, accepted) == 0.0).tolist()
    return found


@dataclass
class Interrupt:
    """Raises at the k-th line of the engine's files, or of one function in them."""

    at: int
    within: str | None = None
    count: int = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return self.line if "/thinslice/engine/" in frame.f_code.co_filename else None

    def line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        name = frame.f_code.co_name
        is_meant = name == self.within if self.within else name not in ("__del__", "release")
        if event == "line" and is_meant:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self.line


def interrupted(grammar: Grammar, at: int, within: str | None) -> tuple[list[int], int]:
    engine, interrupt = drafting_engine(), Interrupt(at, within)
    sequence = engine.add_samples(PROMPT, DRAWN, processors=held_to(grammar))[0]
    while engine.has_work:
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            engine.step()
        except KeyboardInterrupt:
            assert interrupt.count == at
        finally:
            sys.settrace(before)
    return sequence.completion_token_ids, interrupt.count


@pytest.mark.parametrize("within", [None, "_at"])
@pytest.mark.usefixtures("always_drafting")
def test_an_interrupt_at_any_line_changes_no_token(is_long: bool, within: str | None) -> None:
    grammar = compiled(Constraint.regex("(ab|ba|a|b){12}"))
    expected, num_lines = interrupted(grammar, 0, within)
    seed = random.randrange(1 << 30)
    print(f"lines drawn with seed {seed}")
    lines = range(1, num_lines + 1)
    for at in lines if is_long else random.Random(seed).sample(lines, 60):
        assert interrupted(grammar, at, within)[0] == expected, at


@pytest.mark.parametrize("tag", [b"</think>", b"<"])
def test_a_thought_is_free_and_the_form_holds_behind_it(tag: bytes) -> None:
    """The tag is one token or several, and the token that ends it may begin the answer."""
    grammar, row = compiled(FORMS["schema"], "open"), np.zeros(64, np.float32)
    thought = [TOKENS.index(b"\xe2"), TOKENS.index(b"a"), TOKENS.index(b"{")]
    assert set(following(grammar, row, thought, [])) >= {*range(2, 38)}
    assert 1 not in following(grammar, row, thought, [])
    if tag == b"</think>":
        after = [*thought, TOKENS.index(tag), TOKENS.index(b"\n")]
        assert {text_of([one])[:1] for one in following(grammar, row, after, [])} == {b"{", b"\n"}
    else:
        signs = [TOKENS.index(bytes([one])) for one in b"</think"]
        after = [*thought, *signs, TOKENS.index(b">\n{")]
        begins = {text_of([one])[:1] for one in following(grammar, row, after, [])}
        assert begins == {b'"', b"\n", b" "}


def test_a_model_may_open_its_thought_itself() -> None:
    grammar, row = compiled(FORMS["schema"], "possible"), np.zeros(64, np.float32)
    begins = {text_of([one])[:1] for one in following(grammar, row, [], [])}
    assert begins == {b"{", b"<", b" ", b"\n"}
    opened = [TOKENS.index(b"<think>")]
    assert set(following(grammar, row, opened, [])) >= {*range(2, 38)}
    assert text_of(following(grammar, row, [], [TOKENS.index(b"{")]))[:1] in b'{"\n '


def test_what_else_changes_the_row_has_to_leave_a_token() -> None:
    follower, tokens = (
        compiled(FORMS["choice"]).follower(),
        SimpleNamespace(completion_token_ids=[]),
    )
    row = np.full(64, -np.inf, np.float32)
    row[TOKENS.index(b"{")] = 1.0
    with pytest.raises(RequestError, match="no token of the model goes on"):
        follower(row, tokens, [])  # type: ignore[arg-type]


def test_behind_an_end_a_row_stays_as_it_is() -> None:
    follower, row = compiled(FORMS["choice"]).follower(), np.zeros(64, np.float32)
    tokens: Any = SimpleNamespace(completion_token_ids=[TOKENS.index(b"1"), TOKENS.index(b"2")])
    assert follower(row, tokens, [1]) is row
    assert np.flatnonzero(follower(row, tokens, []) == 0.0).tolist() == [1]


def test_a_bias_makes_nothing_possible_and_log_probabilities_are_the_model_s() -> None:
    params = replace(DRAWN, temperature=0, logit_bias={TOKENS.index(b"{"): 100}, logprobs=1)
    engine = tiny_engine()
    sequence = engine.add_samples(PROMPT, params, processors=held_to(compiled(FORMS["choice"])))[0]
    run_all(engine)
    assert text_of(sequence.completion_token_ids).decode() in ("abc", "abd", "12")
    assert sequence.finish_reason == "stop"
    free = tiny_engine()
    other = free.add_request(PROMPT, replace(params, max_tokens=1, logit_bias=(), ignore_eos=True))
    run_all(free)
    assert sequence.logprobs[0].top == other.logprobs[0].top


def test_a_text_that_leaves_its_bounds_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STATES", 12)
    grammar, engine = compiled(Constraint.regex("[ab]*a[ab]{30}")), tiny_engine()
    failing = engine.add_samples(PROMPT, DRAWN, processors=held_to(grammar))[0]
    other = engine.add_request(PROMPT, replace(DRAWN, seed=9))
    run_all(engine)
    assert failing.finish_reason == "error"
    assert "too many states" in str(failing.error)
    alone = tiny_engine()
    expected = alone.add_request(PROMPT, replace(DRAWN, seed=9))
    run_all(alone)
    assert other.completion_token_ids == expected.completion_token_ids


WIDE = {"anyOf": [{"type": "object", "required": [f"p{one}"]} for one in range(10_000)]}
TOGETHER = {"allOf": [{"type": "string", "pattern": f"[ab]*a[ab]{{{n}}}"} for n in range(5, 40)]}
NAMED = {"patternProperties": {f"^a{n}.*": {"type": "integer"} for n in range(300)}}


# Where the library looks for schemas, and the standard has none.
HIDING = (
    *("b", "$defs/a/b", "$defs/a/const", "$defs/a/enum/0", "$defs/a/minimum", "items/0"),
    *("$defs/a%2Fb", "$defs"),
)


def hidden(path: str) -> Any:
    """A schema that refers to one that would take long, at some place."""
    found: Any = {"type": "integer", "multipleOf": 1_000_003}
    for key in reversed(path.replace("%2F", "/").split("/")):
        found = [found] if key == "0" and "enum" in path else {key: found}
    return {"$ref": f"#/{path}", **found}


@pytest.mark.parametrize(
    "ref", ["#", "#/$defs/a", "#/properties/pattern", "#/$defs/c/anyOf/1", "#/$defs/b%20~1"]
)
def test_a_schema_refers_to_those_within_it(ref: str) -> None:
    named = {"a": {"type": "string"}, "c": {"anyOf": [{}, {}]}, "b /": {"enum": [1]}}
    compiled(
        Constraint.json_schema(
            {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "more": {"$ref": ref}},
                "$defs": named,
            }
        )
    )


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (WIDE, "bytes; at most"),
        (TOGETHER, "35 patterns and formats beside allOf"),
        (NAMED, "300 patternProperties"),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"multipleOf": 0}, "multipleOf 0"),
        ({"type": "nonsense"}, "Invalid type"),
        ({"items": [{"type": "integer", "multipleOf": 1_000_003}]}, "multipleOf"),
        ({"$ref": "http://example.com/x"}, "same document"),
        ({"$ref": "#a", "b": {"$anchor": "a", "type": "string"}}, "same document"),
        *((hidden(path), "same document") for path in HIDING),
        ({"properties": 5}, "properties 5; expected schemas by name"),
        ({"items": {"allOf": None}}, "allOf None; expected a list of schemas"),
        ({"format": []}, "format []; expected a text"),
        ({"properties": {"a": {}}, "required": [[]]}, "expected a list of texts"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "form of the answer"),
        (False, "the schema is False"),
    ],
)
def test_what_is_too_large_or_no_schema_is_told(schema: Any, told: str) -> None:
    with pytest.raises(RequestError, match=re.escape(told)):
        compiled(Constraint.json_schema(schema)).follower()(
            np.zeros(64, np.float32),
            SimpleNamespace(completion_token_ids=[]),  # type: ignore[arg-type]
            [],
        )


def test_a_schema_is_bounded_in_depth() -> None:
    deep: Any = {"type": "string"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="more than 64 levels deep"):
        Constraint.json_schema(deep)


@pytest.mark.parametrize(
    "pattern", ["[ab]*a[ab]{13}", "((((a*)*)*)*)*b", "(((a{1,50}){1,50}){1,50}){1,50}", r"\d+/\n"]
)
def test_regexes_that_explode_elsewhere_are_followed(pattern: str) -> None:
    grammar = compiled(Constraint.regex(pattern))
    for seed in range(3):
        complete(tiny_engine(), grammar, replace(DRAWN, seed=seed))


def test_there_is_room_or_a_line_says_what_is_missing() -> None:
    with pytest.raises(RequestError, match=r"the vocabulary .* may take 8.0.* MiB, and the plan"):
        compiled(FORMS["choice"], room=Room(1 << 20))
    room = Room(12 << 20)
    grammar = compiled(FORMS["choice"], room=room)
    left = room.left
    follower = grammar.follower()
    assert room.left < left
    del follower
    assert room.left == left
    room.left = 0
    with pytest.raises(BusyError, match="an answer of a given form"):
        grammar.follower()


def test_the_library_is_imported_only_where_there_is_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "llguidance", raising=False)
    with pytest.raises(RequestError, match="the vocabulary"):
        compiled(FORMS["choice"], room=Room(1 << 20))
    assert "llguidance" not in sys.modules


def test_a_vocabulary_that_is_interrupted_gives_its_room_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room()
    grammars = Grammars(tokenizer(), room)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thinslice.engine.grammar.Vocabulary", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grammars.compiled(grammar_of(FORMS["choice"], None, "none"))
    assert room.left == room.most


def test_what_the_plan_has_for_the_vocabulary_is_not_taken_of_the_room_for_answers() -> None:
    texts = [grammar_of(Constraint.choice([one]), None, "none") for one in ("ab", "cd")]
    room, other = Room(7 << 20), Room(1 << 20)
    grammars = Grammars(tokenizer(), room, 9 << 20)
    grammars.compiled(texts[0])
    first = room.most - room.left
    grammars.compiled(texts[1])
    assert room.most - room.left == 2 * first  # what a grammar takes, and no more
    with pytest.raises(RequestError, match="the vocabulary"):
        Grammars(tokenizer(), other, 1 << 20).compiled(texts[0])
    assert other.left == other.most


def test_a_grammar_finds_room_later_where_answers_have_it_now() -> None:
    room = Room(12 << 20)
    grammars = Grammars(tokenizer(), room)
    text = grammar_of(FORMS["choice"], None, "none")
    room.left = 1 << 20
    with pytest.raises(BusyError, match="try again later"):
        grammars.compiled(text)
    room.left = room.most
    grammars.compiled(text)


def test_more_completions_than_ever_find_room_are_refused_for_good() -> None:
    grammar = compiled(FORMS["choice"], room=Room(12 << 20))
    grammar.check_count(3)
    with pytest.raises(RequestError, match="at most 3 fit") as refused:
        grammar.check_count(4)
    assert not isinstance(refused.value, BusyError)


@pytest.mark.parametrize("reserved", [0, 6 << 20])
def test_a_grammar_that_never_fits_beside_the_vocabulary_is_refused_for_good(reserved: int) -> None:
    text = grammar_of(Constraint.choice(["a" * 3000]), None, "none")
    room = Room((12 << 20) - reserved)
    with pytest.raises(RequestError, match="this form of an answer") as refused:
        Grammars(tokenizer(), room, reserved).compiled(text)
    assert not isinstance(refused.value, BusyError)


def test_the_last_grammars_are_kept() -> None:
    room = Room()
    grammars = Grammars(tokenizer(), room)
    texts = [grammar_of(Constraint.choice([f"a{one}"]), None, "none") for one in range(20)]
    first = grammars.compiled(texts[0])
    assert grammars.compiled(texts[0]) is first
    left = room.left
    grammars.compiled(texts[1])
    one = left - room.left
    for text in texts[2:]:
        grammars.compiled(text)
    assert grammars.compiled(texts[0]) is not first
    del first
    assert left - room.left < 8 * one
    grammars.let_go()
    assert room.left == 1 << 40


def test_a_handler_may_close_in_the_middle_of_a_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked for there is refused; it would wait for itself."""
    room = Room()
    grammars = Grammars(tokenizer(), room)
    text = grammar_of(FORMS["choice"], None, "none")
    grammars.compiled(text)
    asked = []

    def handler(matcher: Any) -> bool:
        with pytest.raises(BusyError, match="is compiled at this moment; ask after that"):
            grammars.compiled(text)
        grammars.let_go()
        asked.append(room.left)
        return False

    monkeypatch.setattr("llguidance.LLMatcher.is_error", handler, raising=False)
    other = grammars.compiled(grammar_of(FORMS["regex"], None, "none"))
    assert asked[0] < room.most
    del other
    assert room.left == room.most
    monkeypatch.undo()
    grammars.compiled(text)
    grammars.let_go()
    assert room.left == room.most


def test_without_the_library_a_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=re.escape(MISSING)):
        compiled(FORMS["choice"])


def test_a_model_without_an_end_has_no_forms() -> None:
    with pytest.raises(RequestError, match="name no end token"):
        Grammars(tokenizer(frozenset()), Room()).compiled("")


def test_objects_are_closed_only_where_nothing_is_joined() -> None:
    inner = {"type": "object", "properties": {"title": {"type": "string", "title": "x"}}}
    plain = for_grammar({"type": "array", "items": inner, "description": "y"})
    assert plain["items"]["additionalProperties"] is False
    assert plain["items"]["properties"] == {"title": {"type": "string"}}
    assert "additionalProperties" not in for_grammar({"allOf": [inner]})["allOf"][0]
    for more in ({"required": ["other"]}, {"anyOf": [{}]}, {"additionalProperties": True}):
        assert for_grammar({**inner, **more}).get("additionalProperties") is not False


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constraint("xml", "a"),  # type: ignore[arg-type]
        lambda: Constraint(np.array([1, 2]), "a"),  # type: ignore[arg-type]
        lambda: Constraint("regex", ""),
        lambda: Constraint.regex("a" * 5000),
        lambda: Constraint.choice([]),
        lambda: Constraint.choice("abc"),
        lambda: Constraint.choice(["a", ""]),
        lambda: Constraint.json_schema("{"),
        lambda: Constraint.json_schema([]),  # type: ignore[arg-type]
        lambda: Constraint.json_schema({"const": float("nan")}),
        lambda: SamplingParams(constraint="json"),  # type: ignore[arg-type]
        lambda: SamplingParams(constraint=FORMS["choice"], ignore_eos=True),
    ],
)
def test_what_is_no_constraint_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(RequestError):
        make()


def test_branches_that_may_hold_together_are_refused_by_what_a_schema_can_say() -> None:
    schema = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    with pytest.raises(RequestError, match="exclude each other by type, const or") as refused:
        compiled(Constraint.json_schema(schema))
    assert "coerce" not in str(refused.value)
