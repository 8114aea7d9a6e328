"""The small trained model: it answers, and its prediction layer drafts what it then says."""

import json
import random
from itertools import islice

import pytest

from tests.speculation import SMALL_MTP, Speculation, embedding_first, load_small_mtp
from thinslice.checkpoint.open import open_checkpoint
from thinslice.text.tokenizer import load_tokenizer
from thinslice.units import MIB
from tools.small_mtp_text import END_OF_TEXT, NUM_TOKENS, TURN_END, Example, examples

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS = (END_OF_TEXT, TURN_END)
COUNT, LONGEST = 50, 96


def held_out(count: int, kind: str | None = None) -> list[Example]:
    """Examples that training never saw."""
    every = examples(random.Random(2), held_out=True)
    return list(islice((one for one in every if kind in (None, one.kind)), count))


def speculate(prompts: list[list[int]], num_drafts: int = 1, *, swap: bool = False) -> Speculation:
    """All prompts continued greedily at once."""
    weights = load_small_mtp()
    if swap:
        embedding_first(weights)
    speculation = Speculation(weights, prompts, num_drafts, ENDS)
    speculation.generate(LONGEST)
    return speculation


def acceptance(speculation: Speculation) -> float:
    drafted = sum(run.num_drafted for run in speculation.runs)
    return sum(run.num_accepted for run in speculation.runs) / drafted


def test_it_is_small_and_has_a_prediction_layer() -> None:
    checkpoint = open_checkpoint(SMALL_MTP)
    assert checkpoint.shape.architecture == "MiMoForCausalLM"
    assert checkpoint.shape.num_nextn_predict_layers == 1
    assert sum(path.stat().st_size for path in SMALL_MTP.iterdir()) < 1.5 * MIB


def test_its_tokenizer_encodes_as_training_did() -> None:
    tokenizer = load_tokenizer(open_checkpoint(SMALL_MTP))
    assert tokenizer.special.eos_token_ids == set(ENDS)
    template = tokenizer.chat_template
    assert template is not None
    for one in held_out(20):
        plain = tokenizer.encode(one.prompt + "\n", add_special_tokens=True)
        assert plain == one.prompt_ids
        chat = template.render([{"role": "user", "content": one.prompt}])
        assert tokenizer.encode(chat, add_special_tokens=False) == one.chat_prompt_ids
        answer = tokenizer.encode(one.answer, add_special_tokens=False)
        assert answer == one.answer_ids[:-1]
        assert tokenizer.decode(answer) == one.answer
    assert max(tokenizer.special_token_ids) < NUM_TOKENS


def test_held_out_prompts_are_not_among_those_of_training() -> None:
    trained = {one.prompt for one in islice(examples(random.Random(0), held_out=False), 20_000)}
    assert not any(one.prompt in trained for one in held_out(COUNT))


@pytest.mark.parametrize("kind", ["sum", "count", "copy", "rename"])
def test_it_answers_held_out_prompts(kind: str) -> None:
    asked = held_out(20, kind)
    runs = speculate([one.prompt_ids for one in asked], num_drafts=0).runs
    answers = [run.sequence.completion_token_ids for run in runs]
    right = [answer == one.answer_ids for answer, one in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def test_it_answers_in_a_conversation() -> None:
    asked = held_out(20, "sum")
    runs = speculate([one.chat_prompt_ids for one in asked], num_drafts=0).runs
    answers = [run.sequence.completion_token_ids for run in runs]
    right = [answer == one.chat_answer_ids for answer, one in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.8 * len(right)


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_drafts_are_accepted_and_change_no_token(num_drafts: int) -> None:
    """Those after the first too, which the layer makes of its own output."""
    prompts = [one.prompt_ids for one in held_out(COUNT)]
    plain, drafted = speculate(prompts, num_drafts=0), speculate(prompts, num_drafts)
    for one, other in zip(plain.runs, drafted.runs, strict=True):
        assert one.sequence.completion_token_ids == other.sequence.completion_token_ids
    assert acceptance(drafted) > 0.8
    results = json.loads((SMALL_MTP / "training.json").read_text())["results"]
    if num_drafts == 1:
        assert abs(acceptance(drafted) - results["acceptance_1"]) < 0.05


def test_swapped_halves_are_seen() -> None:
    """The planted fault: embedding first. The text stays; acceptance falls."""
    prompts = [one.prompt_ids for one in held_out(COUNT)]
    assert acceptance(speculate(prompts, swap=True)) < 0.3
