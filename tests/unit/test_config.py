"""What EngineSettings refuses."""

import pytest

from thinslice.config import EngineSettings
from thinslice.errors import ConfigError


@pytest.mark.parametrize("mtp_hidden", ["pre-norm", "post-norm"])
@pytest.mark.parametrize("draft", ["auto", "mtp"])
def test_a_prediction_layer_takes_either_hidden_state(draft: str, mtp_hidden: str) -> None:
    assert EngineSettings(draft=draft, mtp_hidden=mtp_hidden).mtp_hidden == mtp_hidden


def test_a_hidden_state_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="mtp_hidden 'mid' is unknown; one of pre-norm, post-"):
        EngineSettings(mtp_hidden="mid")


@pytest.mark.parametrize("draft", ["ngram", "off"])
def test_a_hidden_state_that_nothing_takes_is_refused(draft: str) -> None:
    with pytest.raises(ConfigError, match=f"draft {draft} uses none; draft mtp does"):
        EngineSettings(draft=draft, mtp_hidden="post-norm")
