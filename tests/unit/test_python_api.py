"""What Python's users see: names, signatures, errors in Python's words, and a page that has all."""

import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import thinslice
from tests import tiny_llm
from thinslice import LLM, BudgetError, ConfigError, RequestError, SamplingParams
from thinslice.config import EngineSettings

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
NAMED = {name for span in re.findall(r"`([^`]+)`", PROSE) for name in re.findall(r"\w+", span)}
# What the plan of memory and the prediction of speed hold is the command line's to explain.
EXPLAINED_ELSEWHERE = ("MemoryPlan", "Prediction")


def documented_names() -> list[str]:
    names = [*thinslice.__all__, *(field.name for field in fields(EngineSettings))]
    for name in thinslice.__all__:
        public = getattr(thinslice, name)
        if is_dataclass(public) and name not in EXPLAINED_ELSEWHERE:
            names += [field.name for field in fields(public)]
    return [name for name in names if name != "__version__"]


@pytest.mark.parametrize("name", sorted(set(documented_names())))
def test_every_public_name_stands_on_the_page(name: str) -> None:
    assert name in NAMED


def test_the_methods_of_a_model_and_their_arguments_stand_on_the_page() -> None:
    for name in ("generate", "chat", "stream", "close"):
        assert name in NAMED
        wanted = set(inspect.signature(getattr(LLM, name)).parameters) - {"self"}
        assert wanted <= NAMED, name


def test_the_signature_of_a_model_has_its_options_and_their_defaults() -> None:
    parameters = inspect.signature(LLM).parameters
    for field in fields(EngineSettings):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters)[:2] == ["model", "progress"]


def test_what_is_exported_suffices_for_what_is_exported() -> None:
    for name in ("generate", "chat", "stream"):
        for text in map(str, inspect.signature(getattr(LLM, name)).parameters.values()):
            for used in re.findall(r"thinslice\.[\w.]*\.(\w+)", text):
                assert used in thinslice.__all__, (name, text)
        result = str(inspect.signature(getattr(LLM, name)).return_annotation)
        assert re.sub(r".*\.|\W", "", result) in thinslice.__all__, result
    assert set(dir(thinslice)) >= set(thinslice.__all__)


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"memory": "1MiB", "context": 64}, BudgetError, 'memory="1MiB" at context=64'),
        ({"context": 100_000_000}, ConfigError, "context=100000000 is out of range"),
        ({"draft": "mtp"}, ConfigError, 'draft="mtp": this model has no'),
        ({"host_memory": "1GiB"}, ConfigError, 'host_memory goes with device="cuda"'),
    ],
)
def test_errors_name_arguments_in_python_and_options_on_the_command_line(
    settings: dict[str, str | int], error: type[BudgetError], told: str, tmp_path: Path
) -> None:
    path = tiny_llm.write_model(tmp_path / "tiny.gguf")
    with pytest.raises(error, match=re.escape(told)) as caught:
        LLM(str(path), **settings)  # type: ignore[arg-type]
    assert "--" not in str(caught.value)
    assert caught.value.with_options is not None
    assert "--" + next(iter(settings)).replace("_", "-") in caught.value.with_options


def test_one_stop_is_taken_as_it_is() -> None:
    params = SamplingParams(stop="end", stop_token_ids=7)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("end",), (7,))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    for wrong in (3, None, {"a"}):
        with pytest.raises(RequestError, match="expected a tuple"):
            SamplingParams(stop=wrong)  # type: ignore[arg-type]
