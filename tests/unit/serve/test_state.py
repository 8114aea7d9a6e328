"""Files of servers that run: whose they are, and who is never taken for a server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from thinslice.cli import servers
from thinslice.errors import ConfigError, ServerError, StoreError
from thinslice.serve import state as module
from thinslice.serve.state import (
    ServerState,
    find_servers,
    is_server,
    memory_of,
    own_state,
    remove_state,
    states_folder,
    tell_to_end,
    wait_for_end,
    write_state,
)

WAITS = "import sys; sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"


@contextmanager
def process(*called: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that runs until it is told to end, or its input ends."""
    command = [sys.executable, "-c", WAITS, *called]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as found:
        assert found.stdout is not None
        found.stdout.read(1)
        try:
            yield found
        finally:
            found.kill()


@contextmanager
def server(folder: Path, model: str = "tiny", port: int = 8000) -> Iterator[ServerState]:
    """A process that was called as a server is, with its file."""
    with process("thinslice", "serve", model) as found:
        state = state_of(found.pid, model, port)
        write_state(state, folder)
        yield state


def state_of(pid: int, model: str = "tiny", port: int = 8000) -> ServerState:
    start = module._start_of(pid)
    assert start is not None
    own = own_state(("127.0.0.1", port), model, 1 << 30, 2)
    return replace(own, pid=pid, start=start)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path))
    return states_folder(os.environ)


def test_a_server_is_found_until_it_takes_its_file_away(folder: Path) -> None:
    assert find_servers(folder).servers == []
    with server(folder) as state, server(folder, "other", 8001) as other:
        found = find_servers(folder)
        assert sorted(found.servers, key=lambda one: one.port) == [state, other]
        assert found.troubles == []
        now, peak = memory_of(state)
        assert 0 < now <= peak
        paths = [*folder.iterdir()]
        assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
        assert folder.stat().st_mode & 0o777 == 0o700
        for path in paths:
            remove_state(path)
        assert find_servers(folder).servers == []


def test_the_file_of_one_that_was_killed_is_removed(folder: Path) -> None:
    with server(folder) as state:
        os.kill(state.pid, signal.SIGKILL)
        os.waitpid(state.pid, 0)
        assert find_servers(folder).servers == []
    assert [*folder.iterdir()] == []
    assert memory_of(state) == (0, 0)


@pytest.mark.parametrize("change", [{"start": 1}, {"place": "x pid:[1]"}])
def test_a_number_that_another_process_has_got_is_no_server(folder: Path, change: Any) -> None:
    with process("thinslice", "serve") as other:
        state = replace(state_of(other.pid), **change)
        write_state(state, folder)
        assert not is_server(state)
        assert tell_to_end(state) is None
        assert find_servers(folder).servers == []
        assert [*folder.iterdir()] == []
        assert other.poll() is None


@pytest.mark.parametrize(
    "called", [(), ("thinslice", "run"), ("serve", "thinslice"), ("xthinslice", "serve")]
)
def test_a_process_of_another_kind_is_never_told_to_end(
    folder: Path, called: tuple[str, ...]
) -> None:
    with process(*called) as other:
        state = state_of(other.pid)
        write_state(state, folder)
        assert tell_to_end(state) is None
        with pytest.raises(ConfigError, match="no server runs"):
            servers.stop("tiny")
        assert other.poll() is None


def test_files_of_other_machines_and_containers_are_left_alone(folder: Path) -> None:
    with server(folder) as state:
        boot, _, view = state.place.partition(" ")
        elsewhere = replace(state, pid=1, start=1, machine="another", place=f"x {view}")
        container = replace(state, pid=1, start=2, place=f"{boot} pid:[1]")
        before_boot = replace(state, pid=1, start=3, place=f"x {view}")
        for one in (elsewhere, container, before_boot):
            write_state(one, folder)
        assert find_servers(folder).servers == [state]
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            (f"{state.pid}-{state.start}.json", "1-1.json", "1-2.json")
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"[" * 60_000, "tells of no server"),
        (b" " * 70_000, "too large"),
        (b"\xff", "decode"),
        (b"null", "fields are others"),
        ({"pid": -1}, "none of a process"),
        ({"pid": True}, "pid is True"),
        ({"pid": 1.5}, "pid is 1.5"),
        ({"port": 1 << 16}, "none of a process"),
        ({"model": 1}, "model is 1"),
        ({"more": 1}, "fields are others"),
    ],
)
def test_a_file_of_something_else_is_a_line(
    folder: Path, change: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(folder) as state:
        path = folder / "broken.json"
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            path.write_text(json.dumps({**state.__dict__, **change}))
        found = find_servers(folder)
        assert found.servers == [state]
        (line,) = found.troubles
        assert str(path) in line
        assert told in line
        assert "\n" not in line
        servers.ps(as_json=True)
        shown = capsys.readouterr()
        assert line in shown.err.replace("\n", " ")
        assert [one["pid"] for one in json.loads(shown.out)["servers"]] == [state.pid]
        assert path.exists()


def test_what_cannot_be_read_or_written_is_told(folder: Path, tmp_path: Path) -> None:
    with server(folder) as state:
        (folder / "x.json").mkdir()
        assert "x.json cannot be read" in find_servers(folder).troubles[0]
        file = tmp_path / "file"
        file.write_text("")
        with pytest.raises(StoreError, match="Not a directory"):
            write_state(state, file / "servers")
        with pytest.raises(StoreError, match="cannot be read: Not a directory"):
            find_servers(file)


def test_a_server_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers.ps()
    assert "no server runs" in capsys.readouterr().err
    with server(folder) as state:
        servers.ps()
        row = capsys.readouterr().out.splitlines()[1].split()
        assert row[:3] == ["tiny", "127.0.0.1:8000", str(state.pid)]
        assert "1.00 GiB" in " ".join(row)
        servers.ps(as_json=True)
        (record,) = json.loads(capsys.readouterr().out)["servers"]
        assert record["budget_bytes"] == 1 << 30
        assert 0 < record["rss_bytes"] <= record["peak_bytes"]


def test_servers_are_stopped_by_name_by_port_or_all(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(folder, "a", 1) as first, server(folder, "a", 2), server(folder, "b", 3) as third:
        for asked, told in ((None, "several servers run"), ("a", "several"), ("c", "no server is")):
            with pytest.raises(ConfigError, match=told):
                servers.stop(asked)
        with pytest.raises(ConfigError, match="--all stops every server"):
            servers.stop("a", every=True)
        assert servers.stop("b") == 0
        assert f"stopped b at 127.0.0.1:3, process {third.pid}" in capsys.readouterr().err
        assert servers.stop("1") == 0
        assert not is_server(first)
        assert servers.stop(every=True) == 0
    with pytest.raises(ConfigError, match="no server runs"):
        servers.stop()
    assert servers.stop(every=True) == 0
    assert "no server runs" in capsys.readouterr().err


def test_one_of_another_user_is_told_and_others_are_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send = signal.pidfd_send_signal
    with server(folder, "mine") as mine, server(folder, "theirs") as theirs:

        def refused(descriptor: int, number: int) -> None:
            text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
            if f"Pid:\t{theirs.pid}\n" in text:
                raise PermissionError
            send(descriptor, number)

        monkeypatch.setattr(signal, "pidfd_send_signal", refused)
        assert servers.stop(every=True) == ServerError.exit_code == 7
        assert "is another user's" in capsys.readouterr().err
        assert not is_server(mine)
        assert is_server(theirs)


def test_one_that_does_not_end_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(servers, "_MORE_S", -1.9)
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    with server(folder) as state:
        assert servers.stop() == 7
        told = capsys.readouterr().err
        assert f"kill -9 {state.pid}" in told
        assert is_server(state)


def test_waiting_tells_how_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    passed: list[float] = []
    with process("thinslice", "serve") as found:

        def progress(seconds: float) -> None:
            passed.append(seconds)
            if len(passed) == 3:
                found.kill()

        assert wait_for_end(os.pidfd_open(found.pid), 60, progress)
    assert passed == sorted(passed)
    assert len(passed) >= 3
