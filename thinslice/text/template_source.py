"""The source of a model's chat templates: of a GGUF's metadata, or of a folder's files.

Of several named ones, two are used: ``default``, and ``tool_use`` where a conversation has tools.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinslice.checkpoint.file_names import TOOL_TEMPLATES
from thinslice.checkpoint.files import is_there, read_capped
from thinslice.errors import CheckpointError
from thinslice.units import MIB, format_bytes

_MAX_BYTES = 1 * MIB
_CONFIG = "tokenizer_config.json"
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

    def as_config(self) -> str | dict[str, Any] | None:
        """A tokenizer_config.json's chat_template that is read back so; what is no template stays
        none."""
        if self.tool_use is None:
            return None if self.default is None else _as_json(self.default)
        return {"default": _as_json(self.default), "tool_use": _as_json(self.tool_use)}


def gguf_templates(metadata: Mapping[str, Any]) -> TemplateSources:
    """The templates in a GGUF's metadata, under the keys that llama.cpp reads."""
    key = "tokenizer.chat_template"
    return TemplateSources(_of_gguf(metadata, key), _of_gguf(metadata, f"{key}.tool_use"))


def folder_templates(folder: Path, config: Mapping[str, Any]) -> TemplateSources:
    """The templates in a folder; chat_template.jinja and what stands beside it go first, as in
    transformers.

    Args:
        config: what tokenizer_config.json holds.

    Errors: CheckpointError for a file that is too large or cannot be read.
    """
    path = folder / "chat_template.jinja"
    if is_there(path):
        beside = (folder / name for name in TOOL_TEMPLATES)
        tool_use = next((_of_file(one) for one in beside if is_there(one)), None)
        return TemplateSources(_of_file(path), tool_use)
    value = config.get("chat_template")
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = {f"{entry.get('name')}": entry.get("template") for entry in entries}
    if not isinstance(value, dict):
        return TemplateSources(_checked(value, f"{_CONFIG}: chat_template"))
    default: Source = CheckpointError(f"{_CONFIG}: no chat_template is named default")
    if "default" in value:
        default = _checked(value["default"], f"{_CONFIG}: chat_template")
    return TemplateSources(
        default, _checked(value.get("tool_use"), f"{_CONFIG}: chat_template tool_use")
    )


def _of_file(path: Path) -> Source:
    content = read_capped(path, _MAX_BYTES)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return CheckpointError(f"{path} is not UTF-8 text")


def _of_gguf(metadata: Mapping[str, Any], key: str) -> Source:
    try:
        return _checked(metadata.get(key), f"GGUF: {key.removeprefix('tokenizer.')}")
    except CheckpointError as error:  # what is not UTF-8 is refused where it is asked for
        return error


def _checked(value: Any, name: str) -> Source:
    """A template, none where it is empty, or what is wrong."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return CheckpointError(f"{name} is {value!r:.60}; expected a string")
    # A template in a JSON string may hold halves of surrogate pairs.
    num_bytes = len(value.encode(errors="surrogatepass"))
    if num_bytes > _MAX_BYTES:
        return CheckpointError(
            f"{name} has {format_bytes(num_bytes)}; at most {format_bytes(_MAX_BYTES)} are expected"
        )
    return value


def _as_json(source: Source) -> Any:
    """Empty text for none; a list, which is no template, for what was none before."""
    return [str(source)] if isinstance(source, CheckpointError) else source or ""
