"""SmolLM2 from its GGUF against transformers' own loading of the same file."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engines import engine_of, greedy, logits_of
from tests.numerics.exactness import Reference
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.engine import Engine
from thinslice.text.tokenizer import load_tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Le chat est assis sur",
    "SELECT name FROM users WHERE",
    "The three laws of motion are: 1)",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "नमस्ते, आप कैसे हैं?",
    "বাংলা ভাষা",
    "机器学习是",
    "🙂🙃 emoji",
    "A",
    "   indented\n\n\ttext",
    "Dear Sir or Madam,\n\nI am writing to",
    "If x = 7 and y = 3 then x * y + 2 =",
    "#include <stdio.h>\nint main(void) {",
    "To be, or not to be, " * 12,
    "The quick brown fox jumps over the lazy dog. " * 20,
)


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Engine:
    return engine_of(open_checkpoint(smollm2_path), dtype="float32", context=1024)


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(open_checkpoint(smollm2_path))
    return [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]


def test_logits_of_20_prompts_equal_transformers(
    engine: Engine, reference: PreTrainedModel, prompts: list[list[int]]
) -> None:
    assert len(prompts) == 20
    Reference(reference).check(*((prompt, logits_of(engine, prompt)) for prompt in prompts))


def test_64_greedy_tokens_equal_transformers(
    engine: Engine, reference: PreTrainedModel, prompts: list[list[int]], is_long: bool
) -> None:
    reference.generation_config.eos_token_id = None  # go on for 64 tokens, as ours does
    for prompt in prompts[: 20 if is_long else 1]:
        ids = torch.tensor([prompt])
        # Else it takes <|im_end|> in a prompt for padding, and does not attend to it.
        mask = torch.ones_like(ids)
        out = reference.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
        assert greedy(engine, prompt, 64) == out[0, len(prompt) :].tolist()


def test_chunks_and_company_do_not_change_greedy_tokens(
    engine: Engine, smollm2_path: Path, prompts: list[list[int]]
) -> None:
    """A prompt in chunks beside other sequences gives the tokens it gives alone."""
    alone = [greedy(engine, prompt, 8) for prompt in prompts[:4]]
    together = engine_of(open_checkpoint(smollm2_path), "float32", context=256, max_num_seqs=4)
    together.scheduler.chunk = 7
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    sequences = [together.add_request(p, SamplingParams(**params)) for p in prompts[:4]]
    while together.has_work:
        together.step()
        together.scheduler.blocks.check()
    assert [s.completion_token_ids for s in sequences] == alone
