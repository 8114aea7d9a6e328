"""thinslice compare as a user runs it: what it prints, what it refuses, that the budget holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm_start import warm_thinslice
from thinslice.units import MIB

TEXT = "The river runs past the old mill, and every spring the children build small dams. " * 12


def compare(*arguments: str, is_alone: bool = False) -> subprocess.CompletedProcess[str]:
    """Args: is_alone: for what is said of memory: see warm_start."""
    command = [sys.executable, "-m", "thinslice"] if is_alone else warm_thinslice()
    return subprocess.run(
        [*command, "compare", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_model_against_itself_within_the_budget(smollm2_path: Path, text: str) -> None:
    done = compare(
        "smollm2", str(smollm2_path), "--text", text, "--tokens", "150", "--context", "100",
        "--memory", "1GiB", "--json", is_alone=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["kl"] == {"mean": 0.0, "standard_error": 0.0}
    assert record["same_top"]["mean"] == 1.0
    assert record["perplexity_a"] == record["perplexity_b"]
    assert (record["used_tokens"], record["windows"], record["num_scored"]) == (150, 2, 148)
    assert record["peak_bytes"] <= record["budget_bytes"] == 1024 * MIB


def test_the_table_says_what_was_scored(smollm2_path: Path, text: str) -> None:
    done = compare(
        "smollm2", "smollm2", "--text", text, "--tokens", "64", "--dtype-a", "float32",
        "--dtype-b", "bfloat16", "--memory", "2GiB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("PERPLEXITY", "float32", "bfloat16", "KL(A||B) per token", "± ", " nats"):
        assert part in done.stdout
    assert "63 tokens scored: 64 of the text's 205 used, in 1 window of 512" in done.stderr


def test_refusals_are_one_line_and_load_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with (tmp_path / "large.txt").open("wb") as large:
        large.truncate(3 * MIB)
    refusals = (
        (("--text", str(tmp_path / "none.txt")), 2, "none.txt cannot be read: No such file"),
        (("--text", str(tmp_path)), 2, "cannot be read: Is a directory"),
        (("--text", str(tmp_path / "latin.txt")), 5, "is not UTF-8: see byte 3"),
        (("--text", str(tmp_path / "large.txt")), 5, "3.00 MiB; at most 2.00 MiB"),
        (("--text", text, "--context", "1"), 2, "--context 1 leaves no token to predict"),
        (("--text", text, "--context", "9000"), 2, "this model has 1..8192"),
        (("--text", text, "--dtype-b", "half"), 2, 'Invalid value "half" for --dtype-b'),
        (("--text", text, "--memory", "150MiB"), 3, "both models in --memory 150MiB"),
        ((), 2, "--text"),
    )
    for arguments, exit_code, message in refusals:
        refused = compare("smollm2", "smollm2", *arguments)
        assert refused.returncode == exit_code, refused.stderr
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert refused.stdout == ""
