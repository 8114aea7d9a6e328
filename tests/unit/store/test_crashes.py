import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.unit.store.conftest import Tiny
from tests.unit.store.fake_hub import FakeHub, Repo


def kill_at_each_step(tmp_path: Path, name: str, model: dict[str, Any]) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("crash_at_each_step.py")
    command = [sys.executable, str(script), str(tmp_path / "stores"), name, json.dumps(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(kills: list[dict[str, Any]], name: str, files: list[str]) -> None:
    """A model is listed once its manifest stands, and then every file of it stands too.

    Each kill is judged by what it left and not by its turn: how many reports of progress a download
    makes depends on how the network cuts it.
    """
    for kill in kills:
        left = {Path(path).name for path in kill["left"]}
        assert kill["listed"] == ([name] if "manifest.json" in left else [])
        assert not kill["listed"] or left >= set(files), "a model was listed before its files"
        assert kill["files"] == sorted([*files, "manifest.json"])
        assert kill["unfinished"] == 0


def test_an_embedded_pull_killed_at_any_step_is_ended_by_the_next(
    tmp_path: Path, tiny: Tiny
) -> None:
    kills = kill_at_each_step(tmp_path, "tiny", asdict(tiny.model))
    check_kills(kills, "tiny", ["tiny.gguf"])
    assert all(kill["hashes"] == [tiny.model.member_sha256] for kill in kills)
    left = [" ".join(kill["left"]) for kill in kills]
    assert len(kills) > 12
    assert any(kill["listed"] == ["tiny"] for kill in kills), "no kill came after the manifest"
    for state in ("", ".locks", "scratch", ".whl", "tiny.gguf.part", "manifest.json.part"):
        assert any(state in files for files in left), f"no kill left {state}"


def test_a_hub_pull_killed_at_any_step_is_ended_by_the_next(
    tmp_path: Path, hub: FakeHub, monkeypatch: Any
) -> None:
    files = {name: hub.repos["org/tiny"].files[name] for name in ("README.md", "tiny-Q8_0.gguf")}
    hub.repos["org/tiny"] = Repo(files)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    kills = kill_at_each_step(tmp_path, "org/tiny:Q8_0", {})
    check_kills(kills, "org/tiny:Q8_0", list(files))
    expected = [hashlib.sha256(content).hexdigest() for content in files.values()]
    assert all(kill["hashes"] == expected for kill in kills)
    assert len(kills) > 12
    assert any(".part" in path for kill in kills for path in kill["left"])
