"""benchmarks/cuda_card.py without a card, and the arithmetic of its verdict."""

import pytest
import torch

from benchmarks import cuda_card


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["cuda_card.py"])
    assert cuda_card.main() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("benchmarks/cuda_card.py needs a CUDA card: ")


def test_misses_are_named() -> None:
    good = {
        "offload_ratio": 1.2,
        "link_share": 0.9,
        "memory_share": 0.7,
        "per_gib_ratio_1": 1.4,
        "per_gib_ratio_8": 2.0,
    }
    assert cuda_card.misses(good) == []
    assert cuda_card.misses(good | {"memory_share": 0.69}) == ["memory_share"]
