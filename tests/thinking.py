"""The small trained model that thinks, and what tests ask of it."""

import json
import random
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from tests.tiny_llm import beside
from thinslice import LLM
from thinslice.units import MIB
from tools.small_mtp_text import THOUGHT, Example
from tools.small_thinker_text import prompts

SMALL_THINKER = Path(__file__).parent / "models" / "small_thinker"


def load(path: Path = SMALL_THINKER, **settings: Any) -> LLM:
    """The model with room for eight sequences."""
    return LLM(str(path), memory=beside(64 * MIB), max_num_seqs=8, **settings)


def opened(folder: Path) -> Path:
    """The same model with a template that opens the thought, and that cannot be told not to."""
    path = shutil.copytree(SMALL_THINKER, folder / "opened")
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    head, _, _ = config["chat_template"].partition("{% if enable_thinking")
    config["chat_template"] = f"{head}<think>\n{{% endif %}}"
    file.write_text(json.dumps(config), encoding="utf-8")
    return path


def held_out(count: int, seed: int = 0) -> list[Example]:
    """Prompts that training never saw."""
    return list(islice(prompts(random.Random(seed), held_out=True), count))


def asked(example: Example) -> list[dict[str, Any]]:
    """The prompt as a conversation."""
    return [{"role": "user", "content": example.prompt}]


def num_reasoning(token_ids: list[int]) -> int:
    """Tokens of a thought, up to its closing tag, by looking for that."""
    return token_ids.index(THOUGHT) + 1


def last_number(reasoning: str) -> str:
    """The last number that a thought names whole: the answer."""
    numbers = [one for one in reasoning.split() if len(one) == 2 and one.isdigit()]
    return numbers[-1]
