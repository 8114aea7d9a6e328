import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thinslice.errors import CheckpointError, ConfigError
from thinslice.store.names import (
    Embedded,
    HubModel,
    LocalPath,
    name_of_folder,
    parse_model_name,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubModel("org/name")),
        ("Qwen/Qwen3-0.6B", HubModel("Qwen/Qwen3-0.6B")),
        ("org/name@v1.0", HubModel("org/name", "v1.0")),
        ("org/name@refs/pr/12", HubModel("org/name", "refs/pr/12")),
        ("org/name:q4_k_m", HubModel("org/name", None, "Q4_K_M")),
        ("org/name@main:UD-Q4_K_XL", HubModel("org/name", "main", "UD-Q4_K_XL")),
    ],
)
def test_hub_names_are_read(text: str, expected: HubModel) -> None:
    assert parse_model_name(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "org/",
            "/name ",
            "org/name/more",
            "org//name",
            "org/name@",
            "org/name:",
            "org/ name",
        ),
        *("org/..", "org/a..b", "org/a--b", "org/.git", "org/a.git", "-org/name", "org/name."),
        *("org\\name", "org/name\n", "org/na\0me", "org/n\x1b[2Jame", "org/näme", "org/name@a b"),
        *("org/name@../up", "org/name@a/../b", "org/name:../x", "org/name@v1@v2", "org/name:a:b"),
        *("o" * 97 + "/name", "org/" + "n" * 97, "org/name@" + "a" * 65, "org/name:" + "q" * 33),
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        parse_model_name(text)


def test_a_path_that_exists_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "smollm2").mkdir()
    assert parse_model_name("org/name") == LocalPath(Path("org/name"))
    assert isinstance(parse_model_name("smollm2"), Embedded)
    assert parse_model_name("./smollm2") == LocalPath(Path("smollm2"))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert parse_model_name("~/m.gguf") == LocalPath(tmp_path / "m.gguf")


@pytest.mark.parametrize("text", ["./no", "../no/way", "/no/such", "~/no/such", "model.GGUF"])
def test_a_path_that_is_not_there_is_named(text: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        parse_model_name(text)


def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse_model_name("smolm2")
    assert str(error.value) == (
        "unknown model 'smolm2'; did you mean smollm2 or smollm2:360m or smollm2:1.7b? known: "
        "smollm2, the short names of thinslice ls --known, a folder, a .gguf file, "
        "org/name on the Hugging Face Hub"
    )
    (tmp_path / "mimo-7b").mkdir()
    (tmp_path / "mimo-7b" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"did you mean mimo-7b"):
        parse_model_name("Mimo_7b")
    with pytest.raises(ConfigError, match=r"did you mean org/qwen3"):
        parse_model_name("org-qwen3", stored=["org/qwen3"])
    with pytest.raises(ConfigError, match=r"unknown model 'xyzzy'; known: smollm2"):
        parse_model_name("xyzzy")


_hostile = st.lists(
    st.sampled_from(
        [*"aZ09._-/@:+%~\\\0\n é", "..", "../", "--", "%2F", "%2e%2e", "CON", "org", "name", "C:\\"]
    ),
    max_size=14,
).map("".join)
_likely = st.from_regex(
    r"[A-Za-z0-9._-]{1,9}/[A-Za-z0-9._-]{1,9}(@[A-Za-z0-9._/%-]{1,12})?(:[A-Za-z0-9._-]{1,9})?",
    fullmatch=True,
)


@given(st.one_of(_hostile, _likely, st.text(max_size=300)))
@example("org/name@refs/pr/12:Q4_K_M")
@example("o" * 96 + "/" + "n" * 96 + "@" + "/".join("rrrr") + ":Q4")
@example("o" * 90 + "/" + "n" * 90 + "@" + "/".join("rrrr") + ":Q4")
@example("o" * 96 + "/" + "n" * 96 + "@" + "r" * 64)
def test_no_name_leaves_the_store_and_no_two_share_a_folder(text: str) -> None:
    try:
        name = parse_model_name(text)
    except (ConfigError, CheckpointError):
        return
    if isinstance(name, LocalPath):
        assert os.path.exists(os.path.expanduser(text))
        return
    root = Path("/store/models")
    folder = root / name.folder
    assert Path(os.path.normpath(folder)) == folder
    assert folder.parent == root
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@+%-]*", name.folder)
    assert len(f"{name.folder}.lock") <= 255
    assert name_of_folder(name.folder) == name.text
    assert parse_model_name(name.text) == name


@given(st.one_of(_hostile, _likely.map(lambda text: text.replace("/", "--")), st.text()))
def test_a_folder_has_a_name_only_if_the_name_has_that_folder(folder: str) -> None:
    text = name_of_folder(folder)
    if text is not None:
        name = parse_model_name(text)
        assert not isinstance(name, LocalPath)
        assert name.folder == folder
