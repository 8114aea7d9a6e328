"""How an error is told: a setting goes by its option's name, and nothing else is renamed."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from thinslice.cli import commands
from thinslice.cli.exit_codes import _report
from thinslice.config import EngineSettings, SamplingParams
from thinslice.errors import RequestError, ThinsliceError


@pytest.mark.parametrize(
    ("made", "settings", "told"),
    [
        (SamplingParams, {"max_tokens": 0}, "--max-tokens is 0; expected 1.."),
        (SamplingParams, {"top_p": 0.0}, "--top-p is 0; expected above 0"),
        (SamplingParams, {"seed": 1.5}, "--seed is 1.5; expected a whole number"),
        (SamplingParams, {"stop_token_ids": (-1,)}, "a stop token id is -1; expected"),
        (EngineSettings, {"dtype": "int3"}, "--dtype 'int3' is unknown; one of auto"),
        (EngineSettings, {"draft_length": 0}, "--draft-length is 0; expected 1..64 (for none"),
        (EngineSettings, {"max_num_seqs": 0}, "--sequences is 0; expected 1..1024"),
        (EngineSettings, {"context": "x"}, "--context is 'x'; expected a whole number"),
    ],
)
def test_a_setting_goes_by_its_option(
    made: Callable[..., Any],
    settings: dict[str, Any],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ThinsliceError) as caught:
        made(**settings)
    assert _report(caught.value) == caught.value.exit_code
    assert f"error: {told}" in capsys.readouterr().err


def test_a_file_that_is_called_as_a_setting_keeps_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _report(RequestError("seed is not UTF-8: byte 0xff at 0"))
    assert capsys.readouterr().err == "error: seed is not UTF-8: byte 0xff at 0\n"


def test_the_help_of_all_commands_begins_as_that_of_each() -> None:
    for name, (module, told) in commands._COMMANDS.items():
        docstring = getattr(import_module(f"thinslice.cli.{module}"), name).__doc__
        assert " ".join(docstring.split("\n\n")[0].split()) == told
