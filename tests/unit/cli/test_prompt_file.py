"""What holds prompts can be read again and again, also where it is a pipe."""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from tests.tiny_llm import write_model
from thinslice.cli import prompt_file
from thinslice.cli.prompt_file import readable_again
from thinslice.errors import ConfigError, StoreError
from thinslice.units import MIB


@contextmanager
def pipe(path: Path, *pieces: bytes) -> Iterator[Path]:
    """A named pipe into which another thread writes."""
    os.mkfifo(path)

    def write() -> None:
        with open(path, "wb") as file:
            try:
                file.writelines(pieces)
                file.flush()
            except BrokenPipeError:
                file.detach()

    writer = Thread(target=write)
    writer.start()
    yield path
    writer.join()


def test_a_pipe_gives_its_lines_as_often_as_asked(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfone\n \n\ntwo\r\nthree"
    (tmp_path / "file").write_bytes(text)
    with pipe(tmp_path / "pipe.JSONL", text) as path, readable_again(path) as piped:
        expected = [b"one\n", b"two\r\n", b"three"]
        assert [*piped.lines()] == [*piped.lines()] == expected
        assert piped.num_lines() == 3
        assert piped.is_json
    with readable_again(tmp_path / "file") as plain:
        assert [*plain.lines()] == [*plain.lines()] == expected
        assert plain.kept is None
        assert not plain.is_json


def test_what_came_through_a_pipe_is_on_the_disk_and_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(prompt_file, "_folder", lambda: folder)
    lines = [b"x" * MIB + b"\n"] * 24
    tracemalloc.start()
    try:
        with pipe(tmp_path / "pipe", *lines) as path, readable_again(path) as prompts:
            assert prompts.num_lines() == len(lines)
            assert not [*folder.iterdir()]
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
    finally:
        tracemalloc.stop()


def test_a_pipe_that_cannot_be_kept_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pipe(tmp_path / "long", b"x" * (8 * MIB + 1)) as path,
        pytest.raises(ConfigError, match="long has a line of over 8 MiB"),
        readable_again(path),
    ):
        pass
    full = partial(open, "/dev/full", "wb")
    monkeypatch.setattr(prompt_file.tempfile, "TemporaryFile", lambda **_: full())
    with (
        pipe(tmp_path / "pipe", b"one\n") as path,
        pytest.raises(StoreError, match=r"the disk is full for the prompts of .*; name .* TMPDIR"),
        readable_again(path),
    ):
        pass


def test_the_command_answers_what_is_piped_in(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf")
    asked = ["run", str(model), "--raw", "--max-tokens", "2", "--context", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "thinslice", *asked, "--prompts", "/dev/stdin"],
        input=b"one\ntwo\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 2
