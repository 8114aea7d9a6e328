"""A stream tells how much of its prompt has been computed."""

from pathlib import Path

import pytest

from tests.tiny_llm import write_model
from thinslice.config import SamplingParams
from thinslice.engine.llm import LLM
from thinslice.errors import ContextError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_progress_grows_towards_the_prompts_length_and_ends_with_the_first_token(
    tiny: Path,
) -> None:
    told: list[tuple[int, int]] = []
    with LLM(str(tiny), memory="2GiB", context=512, max_num_seqs=1) as llm:
        prompt = "x" * 500
        params = SamplingParams(max_tokens=3, temperature=0)
        chunk = llm.engine.scheduler.chunk = 64
        for _ in llm.stream(prompt, params, lambda done, total: told.append((done, total))):
            pass
    total = told[0][1] if told else 0
    done = [one for one, _ in told]
    assert total == 500
    assert done == sorted(set(done))
    assert done[0] > 0
    assert done[-1] < total
    assert len(done) == (500 - 1) // chunk


def test_a_prompt_without_room_for_an_answer_is_a_context_error(tiny: Path) -> None:
    with LLM(str(tiny), memory="2GiB", context=256, max_num_seqs=1) as llm:
        for length in (256, 300, 100_000):
            with pytest.raises(ContextError, match="context"):
                llm.stream("x " * (length // 2))
