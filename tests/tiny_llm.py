"""A tiny random model with a byte-level tokenizer and a chat template, in one GGUF file."""

from pathlib import Path

from tests.checkpoints import GgufOptions, GgufTokenizer, tiny_config, write_gguf_model
from thinslice.memory.meter import current_rss_bytes
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer import BYTE_TO_CHARACTER

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def beside(num_bytes: int) -> int:
    """A budget with so much room beside what this process has come to hold."""
    return current_rss_bytes() + num_bytes


def write_model(path: Path, chat_template: str = TEMPLATE, context: int = 512) -> Path:
    """Write the model and return its path.

    Args:
        context: the most positions it is said to know.
    """
    config = tiny_config(
        vocab_size=259, bos_token_id=257, eos_token_id=258, max_position_embeddings=context
    )
    tokenizer = GgufTokenizer(
        tokens=(*BYTE_TO_CHARACTER, "th", *SPECIAL),
        merges=("t h",),
        token_types=(*[1] * 257, 3, 3),
        pre="smollm",
        chat_template=chat_template,
    )
    write_gguf_model(path, shape_from_config(config), 1, GgufOptions(tokenizer=tokenizer))
    return path
