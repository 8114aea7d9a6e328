"""thinslice doctor: what this machine has, and whether thinslice will work on it."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from thinslice.cli.console import out, print_json, show_text
from thinslice.cli.options import Json

if TYPE_CHECKING:
    from thinslice.cli.machine import Finding

_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(*, as_json: Json = False) -> int:
    """Tell what this machine has and whether thinslice will work; exit code 1 where it will not.

    Args:
        as_json: Print one JSON object instead of the table.
    """
    from thinslice.cli.machine import examine

    findings = examine()
    works = all(finding.state != "bad" for finding in findings)
    if as_json:
        print_json({"works": works, "findings": [asdict(f) for f in findings]})
    else:
        out.print(_table(findings))
        show_text("thinslice will work here" if works else "thinslice will not work here as it is")
    return 0 if works else 1


def _table(findings: "list[Finding]") -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(mark, finding.name, finding.value)
    return table
