"""What an error about the budget suggests holds for all that loading does, packing included."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import GgufOptions
from tests.unit.engine.test_planning import write
from thinslice.engine.llm import LLM
from thinslice.errors import BudgetError
from thinslice.memory.meter import current_rss_bytes
from thinslice.units import MIB


def text_of(error: BudgetError) -> str:
    """As the command line says it."""
    return str(error.with_options or error)


def suggestions(error: BudgetError) -> list[tuple[str, str]]:
    return re.findall(r"^    --([\w-]+) (\S+)$", text_of(error), re.MULTILINE)


def load(model: Path, **settings: Any) -> BudgetError | None:
    """Load and close; the error where it is refused."""
    try:
        LLM(str(model), max_num_seqs=1, **settings).close()
    except BudgetError as error:
        return error
    return None


@pytest.mark.parametrize("room", [1, 18, 40, 55])
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_every_suggestion_is_taken_when_it_is_followed(
    dtype: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From budgets that hold nothing to those in which packing alone does not fit."""
    model = write(tmp_path, GgufOptions(dtype="F16"))
    # What packing and loading wake in a process they wake once; here the process is an old one.
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "woken"))
    assert load(model, memory=current_rss_bytes() + 400 * MIB, dtype=dtype) is None
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "store"))
    settings: dict[str, Any] = {"memory": current_rss_bytes() + room * MIB, "dtype": dtype}
    error = load(model, **settings)
    if error is None:
        return
    assert suggestions(error), text_of(error)
    for index, (option, value) in enumerate(suggestions(error)):
        monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / f"store-{index}"))
        again = load(model, **{**settings, option.replace("-", "_"): value})
        assert again is None, f"--{option} {value}: {again}"


def test_a_copy_that_is_there_needs_no_room_to_be_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path, GgufOptions(dtype="F16"))
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "store"))
    error = load(model, memory=current_rss_bytes() + 36 * MIB, dtype="int8")
    assert error is not None
    assert "--dtype int8 has to be packed first, which does not fit --memory" in text_of(error)
    assert error.to_pack is not None
    assert text_of(error).endswith(error.to_pack)
    error = load(model, memory=current_rss_bytes() + 1 * MIB, dtype="int8")
    assert error is not None
    assert error.to_pack is None, "it does not fit either once it is packed"
    assert load(model, memory=current_rss_bytes() + 200 * MIB, dtype="int8") is None
    assert load(model, memory=current_rss_bytes() + 48 * MIB, dtype="int8") is None
