"""Short names stand for repositories, and what their makers advise is found by either name."""

import re
from pathlib import Path

import pytest

from thinslice.errors import ConfigError
from thinslice.store.known_models import EMBEDDED, KNOWN, known_model_of
from thinslice.store.names import HubModel, advised_system_prompt, parse_model_name

DOCS = Path(__file__).parents[3] / "docs" / "models.md"


@pytest.mark.parametrize("name", KNOWN)
def test_a_short_name_is_the_repository_it_stands_for(name: str) -> None:
    assert parse_model_name(name) == HubModel(KNOWN[name].repo_id, KNOWN[name].revision)
    assert parse_model_name(KNOWN[name].repo_id) == HubModel(KNOWN[name].repo_id)


def test_no_name_is_taken_twice_and_none_could_be_a_repository() -> None:
    assert not set(KNOWN) & set(EMBEDDED)
    assert not any("/" in name for name in KNOWN)
    assert len({model.repo_id for model in KNOWN.values()}) == len(KNOWN)


def test_a_short_name_comes_before_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwq").mkdir()
    assert parse_model_name("qwq") == HubModel("Qwen/QwQ-32B")
    assert parse_model_name("./qwq") != HubModel("Qwen/QwQ-32B")


def test_a_name_that_is_nearly_known_is_guessed() -> None:
    with pytest.raises(ConfigError, match=re.escape("did you mean qwen3:8b")):
        parse_model_name("qwen3-8b")


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("mimo", ""),
        ("XiaomiMiMo/MiMo-7B-RL-0530", ""),
        ("XiaomiMiMo/MiMo-7B-RL@main", ""),
        ("mimo:base", None),
        ("qwen3:4b", None),
        ("smollm2", None),
        ("somebody/else", None),
    ],
)
def test_advice_goes_by_the_repository(name: str, system: str | None) -> None:
    assert advised_system_prompt(name) == system


def test_what_is_known_stands_in_the_documentation() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, model in KNOWN.items():
        row = f"| `{name}` | {model.parameters} | {model.licence} | {model.repo_id} |"
        assert row in text
        assert known_model_of(model.repo_id) == model
