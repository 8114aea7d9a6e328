"""thinslice run in a terminal, under Ctrl-C, and where the output's encoding is not UTF-8."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.terminals import thinslice_in_terminal
from tests.tiny_llm import write_model

GREEDY = ("--memory", "1GiB", "--temperature", "0")


def test_lines_are_broken_between_words(smollm2_path: Path, tmp_path: Path) -> None:
    asked = ("run", "smollm2", *GREEDY, "--quiet", "--max-tokens", "60", "Describe the sea.")
    piped = subprocess.run(
        [sys.executable, "-m", "thinslice", *asked], capture_output=True, text=True, check=True
    )
    with thinslice_in_terminal(*asked, home=tmp_path, columns=30) as program:
        assert program.end() == 0
        answer = program.shown
    lines = answer.splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 30, lines
    assert " ".join(answer.split()) == " ".join(piped.stdout.split())


def test_a_long_prompt_shows_how_far_it_is(smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("one two three four five six " * 600)
    asked = ("run", "smollm2", "--max-tokens", "4", "--file", str(tmp_path / "long.txt"))
    # Streamed through a few slices at a time, the prompt takes long on any machine.
    small = ("--memory", "230MiB", "--context", "4096", "--dtype", "bfloat16")
    with thinslice_in_terminal(*asked, *small, home=tmp_path) as program:
        program.wait_for("reading the prompt: ")
        program.wait_for(" tokens")


def test_an_interrupted_run_prints_what_there_is_as_json(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf")
    asked = ["run", str(model), "--raw", "--json", "--ignore-eos", "--context", "500", "hello"]
    # Told on standard error once the first token is there.
    program = (
        "import sys\n"
        "from thinslice.cli.answer_view import PlainView\n"
        "from thinslice.cli import app\n"
        "from thinslice.engine.stream import Stream\n"
        "advance = Stream.__next__\n"
        "def told(self):\n"
        "    if self.completion.token_ids: print('begun', file=sys.stderr, flush=True)\n"
        "    return advance(self)\n"
        "Stream.__iter__ = lambda self: iter(lambda: told(self), None)\n"
        "app.main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *asked],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "begun" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    record = json.loads(shown)
    assert record["finish_reason"] == "abort"
    assert 0 < record["completion_tokens"] < 500


def test_json_loses_nothing_where_the_encoding_is_not_utf8(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf")
    asked = ["run", str(model), "--json", "--max-tokens", "60", "--seed", "3", "é"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "thinslice", *asked]
    done = subprocess.run(command, capture_output=True, check=True, env=env)
    text = json.loads(done.stdout.decode("ascii"))["text"]
    assert not text.replace("\ufffd", "").isascii()
