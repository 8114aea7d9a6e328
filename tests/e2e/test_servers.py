"""thinslice ps and stop, with servers that run."""

import json
import os
import signal
from pathlib import Path

import httpx2
import pytest

from tests.e2e.test_commands import thinslice
from tests.e2e.test_serve import ready, served
from tests.tiny_llm import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path))
    return tmp_path


def test_a_server_is_listed_and_stopped_with_its_answers_ended(home: Path, model: Path) -> None:
    with served(model) as (process, url, _):
        (record,) = json.loads(thinslice("ps", "--json", home=home).stdout)["servers"]
        assert (record["pid"], record["model"]) == (process.pid, str(model))
        assert url.endswith(record["address"])
        assert 0 < record["rss_bytes"] <= record["peak_bytes"] < record["budget_bytes"] == 400 << 20
        body = {"model": str(model), "prompt": "a", "max_tokens": 400, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            done = thinslice("stop", str(record["port"]), home=home)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert done.returncode == 0, done.stderr
        assert f"stopped {model} at 127.0.0.1:{record['port']}" in done.stderr
        assert process.wait(20) == 0
    assert [*(home / "servers").iterdir()] == []


def test_one_that_was_killed_is_not_listed(home: Path, model: Path) -> None:
    with served(model) as (process, url, _):
        ready(url)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len([*(home / "servers").iterdir()]) == 1
        listed = thinslice("ps", home=home)
        assert (listed.returncode, listed.stdout) == (0, "")
        assert "no server runs" in listed.stderr
    assert [*(home / "servers").iterdir()] == []
    done = thinslice("stop", home=home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_home_that_cannot_be_written_is_a_line_and_the_server_serves(
    home: Path, model: Path
) -> None:
    (home / "servers").write_text("")
    with served(model) as (process, url, lines):
        ready(url)
        (line,) = [one for one in lines if "will not find this server" in one]
        assert str(home / "servers") in line
        process.terminate()
        assert process.wait(20) == 0
