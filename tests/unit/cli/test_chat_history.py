"""What was typed comes back after a start, bounded and private."""

import stat
from pathlib import Path

import pytest

from thinslice.cli.chat_history import LONGEST_ENTRY, ChatHistory, history_path


def entries(path: Path | None) -> list[str]:
    return list(ChatHistory(path).load_history_strings())


def test_entries_come_back_newest_first_and_only_the_user_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat-history"
    history = ChatHistory(path)
    for text in (
        "one",
        "two\nlines",
        "two\nlines",
        "  ",
        "x" * (LONGEST_ENTRY + 1),
        "নমস্কার \udc80",
    ):
        history.remember(text)
    assert entries(path) == ["নমস্কার \udc80", "two\nlines", "one"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["chat-history"]


def test_a_second_chat_loses_nothing_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    first, second = ChatHistory(path), ChatHistory(path)
    first.remember("a")
    second.remember("b")
    first.remember("c")
    assert entries(path) == ["c", "b", "a"]


def test_memory_and_file_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    history = ChatHistory(path)
    for number in range(60):
        history.remember(f"{number:02}" + "x" * (LONGEST_ENTRY - 2))
    kept = entries(path)
    assert len(kept) == len(history.get_strings()) == 32
    assert kept[0].startswith("59")
    assert path.stat().st_size < 256 * 1024


def test_a_damaged_file_loses_its_damaged_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    path.write_bytes(b'"good"\n{\n[1]\n\xff\xfe\n' + b"[" * 5000 + b'\n"last"\n')
    assert entries(path) == ["last", "good"]


def test_without_a_place_the_history_stays_in_memory_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = ChatHistory(tmp_path / "file" / "chat-history")
    history.remember("kept")
    assert history.get_strings() == ["kept"]
    assert str(history.trouble).startswith(str(tmp_path / "file" / "chat-history"))
    assert entries(None) == []


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"THINSLICE_HOME": "/models"}, "/models/chat-history"),
        ({"XDG_STATE_HOME": "/state"}, "/state/thinslice/chat-history"),
    ],
)
def test_the_place_is_the_stores_or_the_systems(environ: dict[str, str], expected: str) -> None:
    assert history_path(environ) == Path(expected)


def test_a_relative_state_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    expected = Path("/home/user/.local/state/thinslice/chat-history")
    assert history_path({"XDG_STATE_HOME": "state"}) == expected
