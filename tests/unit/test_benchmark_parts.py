"""benchmarks/parts.py measures what one step adds; docs/memory.md lists all that it measures."""

from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.parts import PARTS, Part, measure, run

TAKE = "kept = bytearray(8 << 20)"


def test_what_a_step_adds_is_measured(tmp_path: Path) -> None:
    taken = measure(Part("8 MiB", "import mmap", TAKE), tmp_path, rounds=1)
    assert 7.9 <= taken["RssAnon"] <= 8.6
    assert 7.9 <= taken["Private"] <= 8.6
    earlier = measure(Part("before", TAKE, "pass"), tmp_path, rounds=1)
    assert earlier["RssAnon"] < 1
    all_there_is = run(Part("interpreter", TAKE, ""), tmp_path)
    assert all_there_is["RssAnon"] >= 8 << 10


def test_the_document_lists_every_part() -> None:
    lines = (ROOT / "docs" / "memory.md").read_text().splitlines()
    listed = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert listed[1:] == ["interpreter", *(part.name for part in PARTS)]
