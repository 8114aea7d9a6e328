"""benchmarks/harness.py compares in pairs, hides no miss and no failure, and cleans up."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.harness import (
    Artefacts,
    Case,
    Figure,
    Run,
    RunError,
    drop_page_cache,
    files_of,
    report,
    run_case,
    run_json,
    run_process,
    use_cores,
)


def giving(*values: float) -> Run:
    """A contestant that gives one value after the other, then fails."""
    left = iter(values)

    def run() -> Figure:
        try:
            return Figure(next(left))
        except StopIteration:
            raise RunError("no more") from None

    return run


def test_a_ratio_is_the_median_of_paired_rounds_not_the_ratio_of_medians() -> None:
    runs = {"thinslice": giving(1.0, 10.0, 2.0), "peer": giving(1.0, 4.0, 8.0)}
    ours, theirs = run_case(Case("c", "tokens/s", runs, {"peer": 1.0}), 3)
    assert (ours.median, theirs.median) == (2.0, 4.0)
    assert theirs.ratio == 1.0
    assert theirs.is_ok is True
    assert ours.ratio is None
    assert ours.is_ok is None


@pytest.mark.parametrize("unit", ["s", "s/token"])
def test_less_is_better_where_seconds_are_compared(unit: str) -> None:
    runs = {"thinslice": giving(2.0), "fast": giving(1.0), "slow": giving(6.0)}
    rows = run_case(Case("c", unit, runs, {"fast": 1.0, "slow": 2.5}), 1)
    assert [row.ratio for row in rows] == [None, 0.5, 3.0]
    assert [row.is_ok for row in rows] == [None, False, True]


def test_who_fails_takes_no_more_part_and_misses_its_target() -> None:
    runs = {"thinslice": giving(), "peer": giving(1.0, 1.0)}
    ours, theirs = run_case(Case("c", "s", runs, {"peer": 1.0}), 2)
    assert ours.values == []
    assert ours.note == "failed: no more"
    assert theirs.values == [1.0, 1.0]
    assert theirs.ratio is None
    assert theirs.is_ok is False


def test_the_report_is_one_json_line_and_a_table_with_every_miss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = {"thinslice": giving(1.0), "peer": giving(2.0), "gone": giving()}
    rows = run_case(Case("c", "tokens/s", runs, {"peer": 1.0}), 1)
    assert report("test", rows, {"shape": "tiny"}) == 1
    assert report("test", rows[:2], {}) == 0
    said = capsys.readouterr()
    first, _ = said.out.splitlines()
    result = json.loads(first)
    assert result["benchmark"] == "test"
    assert result["shape"] == "tiny"
    assert [figure["median"] for figure in result["figures"]] == [1.0, 2.0, None]
    assert "missed" in said.err
    assert "failed: no more" in said.err


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("import sys; sys.exit('error: no such thing')", "error: no such thing"),
        ("import sys; print('error: first', 'last', sep='\\n'); sys.exit(1)", "error: first"),
        ("raise ValueError('bad')", "ValueError: bad"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by the kernel"),
    ],
)
def test_a_process_that_fails_says_why_in_one_line(program: str, complaint: str) -> None:
    with pytest.raises(RunError, match=complaint) as caught:
        run_process([sys.executable, "-c", program])
    assert "\n" not in str(caught.value)


def test_the_json_is_the_last_line() -> None:
    assert run_json([sys.executable, "-c", "print('loading'); print('{\"s\": 1}')"]) == {"s": 1}
    with pytest.raises(RunError, match="no JSON line"):
        run_json([sys.executable, "-c", "print('done')"])


def test_the_users_environment_goes_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIRS", "user")
    show = [sys.executable, "-c", "import os; print(os.environ['THEIRS'], os.environ['OURS'])"]
    said = run_process(show, environment={"THEIRS": "benchmark", "OURS": "benchmark"})
    assert said.split() == ["user", "benchmark"]


def test_only_what_was_made_here_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("kept")
    artefacts = Artefacts(tmp_path, keep=False)
    artefacts.need("theirs", lambda path: pytest.fail("it is there"))
    artefacts.need("file", Path.touch)
    artefacts.need("folder", Path.mkdir)
    artefacts.clean_up()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_everything_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    artefacts = Artefacts(tmp_path, keep=True)
    artefacts.need("file", Path.touch)
    artefacts.clean_up()
    assert (tmp_path / "file").exists()


def test_a_disk_too_small_is_told_before_anything_is_made(tmp_path: Path) -> None:
    artefacts = Artefacts(tmp_path, keep=False)
    artefacts.check_space(1)
    with pytest.raises(RunError, match="--work names another folder"):
        artefacts.check_space(1 << 60)


def test_files_behind_links_leave_the_page_cache_too(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "weights").write_bytes(b"0" * 4096)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert files_of(tmp_path / "link") == [tmp_path / "link" / "weights"]
    drop_page_cache(tmp_path / "link")


def test_more_cores_than_there_are_is_an_error() -> None:
    with pytest.raises(RunError, match="--threads 1000000; this process has"):
        use_cores(1_000_000)
