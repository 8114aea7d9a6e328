"""The source of a model's chat templates: of a GGUF's metadata, or of a folder's files.

Of several named ones, two are used: ``default``, and ``tool_use`` where a conversation has tools.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinslice.checkpoint.files import is_there, read_capped
from thinslice.errors import CheckpointError
from thinslice.units import MIB, format_bytes

_MAX_BYTES = 1 * MIB
# Jinja; None where there is none, and an error where what there is is no template: the model may
# not need it.
Source = str | CheckpointError | None


@dataclass(frozen=True)
class TemplateSources:
    """The templates of a model.

    Attributes:
        tool_use: takes the default's place where a conversation has tools.
    """

    default: Source
    tool_use: Source = None


def gguf_templates(metadata: Mapping[str, Any]) -> TemplateSources:
    """The templates in a GGUF's metadata, under the keys that llama.cpp reads."""
    key = "tokenizer.chat_template"
    return TemplateSources(_of_gguf(metadata, key), _of_gguf(metadata, f"{key}.tool_use"))


def folder_templates(folder: Path, config: Mapping[str, Any]) -> TemplateSources:
    """The templates in a folder: chat_template.jinja goes first, as in transformers.

    Args:
        config: what tokenizer_config.json holds.

    Errors: CheckpointError for a file that is too large or cannot be read.
    """
    path, source = folder / "chat_template.jinja", "tokenizer_config.json"
    if is_there(path):
        content = read_capped(path, _MAX_BYTES)
        try:
            return TemplateSources(content.decode())
        except UnicodeDecodeError:
            return TemplateSources(CheckpointError(f"{path} is not UTF-8 text"))
    value = config.get("chat_template")
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = {f"{entry.get('name')}": entry.get("template") for entry in entries}
    if not isinstance(value, dict):
        return TemplateSources(_checked(value, source))
    default: Source = CheckpointError(f"{source}: no chat_template is named default")
    if "default" in value:
        default = _checked(value["default"], source)
    return TemplateSources(default, _checked(value.get("tool_use"), source))


def _of_gguf(metadata: Mapping[str, Any], key: str) -> Source:
    try:
        return _checked(metadata.get(key), "GGUF")
    except CheckpointError as error:  # what is not UTF-8 is refused where it is asked for
        return error


def _checked(value: Any, source: str) -> Source:
    """A template, none where it is empty, or what is wrong."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return CheckpointError(f"{source}: chat_template is {value!r:.60}; expected a string")
    # A template in a JSON string may hold halves of surrogate pairs.
    num_bytes = len(value.encode(errors="surrogatepass"))
    if num_bytes > _MAX_BYTES:
        return CheckpointError(
            f"{source}: chat_template has {format_bytes(num_bytes)}; at most "
            f"{format_bytes(_MAX_BYTES)} are expected"
        )
    return value
