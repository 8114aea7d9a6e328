"""Names of the small files that lie beside a model's weights. Only data: no code, no pickle."""

import re

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Beside config.json, what says how text becomes tokens and when a completion ends.
SETTINGS = (
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The template for conversations with tools, beside chat_template.jinja: where transformers writes
# it, and where it lies in the store, which has no folders in a model's.
TOOL_TEMPLATES = ("additional_chat_templates/tool_use.jinja", "tool_use.jinja")
MODEL_CARD = "README.md"
_DOCUMENT = re.compile(r"(README|LICEN[CS]E|NOTICE)(\.(md|txt))?")


def is_document(name: str) -> bool:
    """Whether a file is a model card, a licence or a notice."""
    return _DOCUMENT.fullmatch(name) is not None
