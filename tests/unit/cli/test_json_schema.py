"""run --json-schema: from a file to the constraint of an answer."""

from pathlib import Path

import pytest

from thinslice.cli.run import of_schema
from thinslice.config import SamplingParams
from thinslice.constraint import Constraint
from thinslice.errors import ConfigError

GREEDY = SamplingParams(temperature=0)


def test_a_file_becomes_a_constraint(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "boolean"}', encoding="utf-8")
    found = of_schema(GREEDY, path)
    assert found.constraint == Constraint.json_schema({"type": "boolean"})
    assert found.temperature == 0
    assert of_schema(GREEDY, None) is GREEDY


@pytest.mark.parametrize("text", ["{", "[]", "", '{"enum": [' + '"a",' * 60_000 + '"b"]}'])
def test_what_is_no_schema_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--json-schema .*schema\.json: "):
        of_schema(GREEDY, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        of_schema(GREEDY, tmp_path / "missing")
