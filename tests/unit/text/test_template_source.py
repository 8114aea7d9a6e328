"""Of several named templates: the default one, and the one for conversations with tools."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.unit.text.test_tokenizer import BYTE_LEVEL, folder, gguf
from thinslice.checkpoint.file_names import TOOL_TEMPLATES
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError
from thinslice.text.messages import Conversation, for_template
from thinslice.text.template_source import folder_templates, gguf_templates
from thinslice.text.tokenizer import load_tokenizer

PLAIN, WITH_TOOLS = "plain {{ messages[0].content }}", "{{ tools|length }} tools"
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
HELLO = [{"role": "user", "content": "Hello"}]
AS_LIST = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": WITH_TOOLS}]
AS_KEYS = {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tool_use": WITH_TOOLS}


def with_config(tmp_path: Path, template: Any) -> Checkpoint:
    checkpoint = folder(tmp_path, {})
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template}))
    return checkpoint


def rendered(checkpoint: Checkpoint, tools: list[dict[str, Any]]) -> str:
    template = load_tokenizer(checkpoint).chat_template
    assert template is not None
    conversation = for_template(Conversation(HELLO, tools))
    return template.render(conversation.messages, tools=conversation.tools)


@pytest.mark.parametrize("kind", ["list", "mapping", "gguf"])
def test_the_template_for_tools_is_used_where_there_are_any(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        checkpoint = gguf(BYTE_LEVEL | AS_KEYS)
    else:
        mapping = {one["name"]: one["template"] for one in AS_LIST}
        checkpoint = with_config(tmp_path, AS_LIST if kind == "list" else mapping)
    assert rendered(checkpoint, []) == "plain Hello"
    assert rendered(checkpoint, [TOOL]) == "1 tools"


def test_one_that_does_not_compile_is_in_the_way_of_tools_alone(tmp_path: Path) -> None:
    checkpoint = with_config(tmp_path, {"default": PLAIN, "tool_use": "{% if %}"})
    assert rendered(checkpoint, []) == "plain Hello"
    with pytest.raises(CheckpointError, match="does not compile"):
        rendered(checkpoint, [TOOL])
    checkpoint = with_config(tmp_path, {"default": PLAIN, "tool_use": 3})
    assert rendered(checkpoint, []) == "plain Hello"
    with pytest.raises(CheckpointError, match="chat_template tool_use is 3"):
        rendered(checkpoint, [TOOL])


def test_none_named_default_is_told(tmp_path: Path) -> None:
    checkpoint = with_config(tmp_path, {"tool_use": WITH_TOOLS})
    with pytest.raises(CheckpointError, match="no chat_template is named default"):
        rendered(checkpoint, [])


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_template_for_tools_in_a_file_of_its_own_is_read(name: str, tmp_path: Path) -> None:
    """Where transformers' save_pretrained writes it, and where a pulled one lies."""
    checkpoint = with_config(tmp_path, "of the config, which is not read beside the file")
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(WITH_TOOLS)
    assert rendered(checkpoint, []) == "plain Hello"
    assert rendered(checkpoint, [TOOL]) == "1 tools"


def test_markers_of_either_template_that_are_no_tokens_are_named(tmp_path: Path) -> None:
    checkpoint = with_config(tmp_path, {"default": PLAIN, "tool_use": "<|nosuch|>{{ tools }}"})
    (note,) = load_tokenizer(checkpoint).notes
    assert "the chat template writes <|nosuch|>" in note


@pytest.mark.parametrize(
    "templates",
    [
        {"tokenizer.chat_template.tool_use": WITH_TOOLS},
        {"tokenizer.chat_template": "", "tokenizer.chat_template.tool_use": WITH_TOOLS},
        {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tool_use": 3},
        {"tokenizer.chat_template": 3, "tokenizer.chat_template.tool_use": WITH_TOOLS},
        {"tokenizer.chat_template": 3},
        AS_KEYS,
    ],
)
def test_a_tokenizer_config_written_of_them_is_read_back(templates: dict[str, Any]) -> None:
    """What is no template is none afterwards either."""
    before = gguf_templates(templates)
    config = {"chat_template": before.as_config()}
    after = folder_templates(Path("/nowhere"), config)
    for name in ("default", "tool_use"):
        one, other = getattr(before, name), getattr(after, name)
        assert type(one) is type(other)
        assert one == other or isinstance(one, CheckpointError)


def test_a_tokenizer_with_two_templates_goes_with_its_last_name(tmp_path: Path) -> None:
    """No cycle keeps it."""
    tokenizer = load_tokenizer(with_config(tmp_path, AS_LIST))
    template = tokenizer.chat_template
    assert template is not None
    template.render(HELLO, tools=[TOOL])
    gone = weakref.ref(tokenizer)
    del tokenizer, template
    assert gone() is None
