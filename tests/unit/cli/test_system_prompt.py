"""A model that is named by its makers' name gets the system prompt they recommend, and says so."""

import pytest

from thinslice.cli.run import system_prompt


def test_what_the_user_gives_comes_before_what_is_recommended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert system_prompt("mimo", "Be brief.") == "Be brief."
    assert system_prompt("smollm2", None) is None
    assert capsys.readouterr().err == ""
    assert system_prompt("mimo", None) == ""
