"""The soak's load on a tiny model: a few rounds of it hold, and it sees what it is to see."""

import argparse
import time
from pathlib import Path

import pytest

from tests.tiny_llm import beside, write_model
from thinslice.units import GIB
from tools import soak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(soak, "ROUND_S", 1.0)
    monkeypatch.setattr(soak, "NUM_KINDS", 6)
    path = write_model(tmp_path / "tiny.gguf")
    return argparse.Namespace(model=str(path), memory=beside(GIB), seed=5)


def test_rounds_of_load_with_the_model_closed_in_between_hold(options: argparse.Namespace) -> None:
    wrong: list[str] = []
    # From the first round on; the requests are run alone before it.
    summary, peaks = soak.serve(options, time.monotonic() + 8.0, wrong)
    assert wrong == []
    assert len(peaks) >= 1
    assert "length" in summary
    assert all(f"'{kind}': " in summary for kind in ("step", "request", "text"))


def test_an_answer_that_is_not_the_one_given_alone_is_seen(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: what each sample is held against has another first token."""
    read = soak.Load._read

    async def other(self: soak.Load, stream: soak.AsyncStream, kind: soak.Kind) -> None:
        alone = [[-1, *tokens[1:]] for tokens in kind.alone]
        await read(self, stream, soak.Kind(kind.prompt, kind.params, alone))

    monkeypatch.setattr(soak.Load, "_read", other)
    wrong: list[str] = []
    soak.serve(options, 0.0, wrong)
    assert any("other tokens" in text for text in wrong)


def test_memory_that_grows_is_seen() -> None:
    assert soak.growth_of([50, *[100] * 20]) == 0
    assert soak.growth_of([100 + index for index in range(20)]) > soak.LARGEST_GROWTH
