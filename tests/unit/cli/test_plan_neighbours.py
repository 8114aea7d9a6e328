"""What plan says of settings beside the planned ones that do not fit as they are."""

from types import SimpleNamespace
from typing import Any

import pytest

from thinslice.cli import plan
from thinslice.config import EngineSettings
from thinslice.engine import planning
from thinslice.errors import BudgetError, ConfigError
from thinslice.plan.memory_plan import MemoryPlan, Pool

PLAN = MemoryPlan((Pool("--memory", 1 << 30),), "bfloat16", "bfloat16", 64, 16, 1, 16, 4)


def refused(to_pack: str | None) -> BudgetError:
    error = BudgetError("no plan fits")
    error.to_pack = to_pack
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (refused(None), "does not fit"),
        (refused("--memory 198MiB"), "fits once packed, which takes --memory 198MiB"),
        (ConfigError("rows do not divide"), "cannot be packed"),
    ],
)
def test_a_setting_that_does_not_fit_says_why(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit_model(*_: object) -> None:
        raise error

    monkeypatch.setattr(planning, "fit_model", fit_model)
    found: Any = SimpleNamespace(packing=None, shape=SimpleNamespace(max_position_embeddings=64))
    machine = plan._Machine(None, 0, None, None)
    table = plan._neighbours_table(found, EngineSettings(), PLAN, machine)
    labels, weights, *_ = ([*column.cells] for column in table.columns)
    assert "--dtype int8" in labels
    assert set(weights) == {told}
