"""Packed copies in the store: made once, listed, shown, run and removed by name."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from tests.checkpoints import tiny_config, write_safetensors_model
from tests.unit.store.conftest import Tiny
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import ConfigError, StoreError
from thinslice.pack import pack
from thinslice.pack.stored import ensure_packed
from thinslice.plan.packed_format import PackedFormat
from thinslice.store.packed_copies import copy_folder
from thinslice.store.store import Store

INT4, INT8 = PackedFormat.INT4, PackedFormat.INT8
NAME = "packed/tiny-int4"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The default store, in a folder of this test."""
    monkeypatch.setenv("THINSLICE_HOME", str(tmp_path / "home"))
    return Store()


@pytest.fixture
def pulled(home: Store, tiny: Tiny) -> Store:
    home.pull("tiny")
    return home


def copy_of(store: Store, fmt: PackedFormat = INT4) -> Path:
    return ensure_packed(open_checkpoint(store.resolve("tiny")), fmt)


def test_a_copy_is_made_once_and_found_by_name(
    pulled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pulled.packed() == ()
    steps: list[str] = []
    source = open_checkpoint(pulled.resolve("tiny"))
    folder = ensure_packed(source, INT4, lambda step, done, total: steps.append(step))
    assert steps[0] == "packing as int4"
    assert folder == pulled.root / "packed" / "tiny-int4"
    packing = open_checkpoint(folder).packing
    assert packing is not None
    assert packing.weights == "int4"
    (copy,) = pulled.packed()
    assert (copy.name, copy.model, copy.format, copy.is_whole) == (NAME, "tiny", "int4", True)
    assert copy.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert pulled.resolve(NAME) == pulled.ensure(NAME, offline=True) == folder
    assert pulled.locate(NAME) == folder
    shown = pulled.show(NAME)
    assert (shown.name, shown.source, shown.weights) == (NAME, "packed copy", "int4, head int8")
    assert [model.name for model in pulled.list()] == ["tiny"]
    assert pulled.unfinished() == ()

    def never(*arguments: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(pack, "write_weights", never)
    assert ensure_packed(source, INT4) == folder


def test_a_copy_of_files_that_changed_is_made_again(pulled: Store) -> None:
    folder = copy_of(pulled)
    before = (folder / "thinslice.json").read_bytes()
    os.utime(pulled.resolve("tiny"))
    assert copy_of(pulled) == folder
    assert (folder / "thinslice.json").read_bytes() != before
    assert pulled.packed()[0].is_whole


def test_a_copy_is_removed_by_name_or_with_its_model(pulled: Store) -> None:
    copy_of(pulled, INT8)
    folder = copy_of(pulled)
    num_bytes = pulled.packed()[0].num_bytes
    assert pulled.remove(NAME) == num_bytes
    assert not folder.exists()
    assert [copy.name for copy in pulled.packed()] == ["packed/tiny-int8"]
    total = pulled.packed()[0].num_bytes + sum(
        path.stat().st_size for path in (pulled.root / "tiny").iterdir()
    )
    assert pulled.remove("tiny") == total
    assert pulled.packed() == pulled.list() == ()


def test_an_unfinished_copy_is_listed_and_removed(pulled: Store) -> None:
    def stop(step: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_packed(open_checkpoint(pulled.resolve("tiny")), INT4, stop)
    (copy,) = pulled.packed()
    assert not copy.is_whole
    for act in (pulled.resolve, pulled.ensure, pulled.show):
        with pytest.raises(StoreError, match=f"packing of {NAME} is unfinished"):
            act(NAME)
    assert pulled.remove(NAME) == copy.num_bytes > 0
    assert pulled.packed() == ()
    with pytest.raises(StoreError, match="is not stored"):
        pulled.resolve(NAME)


def test_a_copy_of_a_path_is_named_after_it(home: Store, tmp_path: Path) -> None:
    for place in ("one", "two"):
        write_safetensors_model(tmp_path / place / "my model", tiny_config())
        ensure_packed(open_checkpoint(tmp_path / place / "my model"), INT4)
    copies = home.packed()
    assert len(copies) == 2, "the same last part, but another path"
    assert all(copy.name.startswith("packed/my_model-") and copy.model is None for copy in copies)
    assert home.resolve(copies[0].name) == copies[0].path


def test_what_another_process_holds_is_waited_for_or_not_removed(pulled: Store) -> None:
    folder = copy_of(pulled)
    lock = FileLock(pulled.root / ".locks" / "packed-tiny-int4.lock", thread_local=False)
    waiting = threading.Event()

    def watch(step: str, done: int, total: int) -> None:
        if step.startswith("waiting for another packing of packed/tiny-int4"):
            waiting.set()

    with lock:
        with pytest.raises(StoreError, match=f"another process is packing {NAME}; remove it when"):
            pulled.remove("tiny")
        source = open_checkpoint(pulled.resolve("tiny"))
        found: list[Path] = []
        waiter = threading.Thread(target=lambda: found.append(ensure_packed(source, INT4, watch)))
        waiter.start()
        assert waiting.wait(60)
    waiter.join(60)
    assert found == [folder]
    assert [model.name for model in pulled.list()] == ["tiny"]


def test_links_and_foreign_folders_are_left_alone(pulled: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    place = pulled.root / "packed"
    place.mkdir()
    (place / "tiny-int4").symlink_to(outside)
    (place / "my notes").mkdir()
    assert pulled.packed() == ()
    with pytest.raises(StoreError, match="is a link"):
        copy_of(pulled)
    with pytest.raises(ConfigError, match="unknown model"):
        pulled.remove("packed/../tiny")
    pulled.remove("tiny")
    assert (outside / "precious").exists()
    assert (place / "my notes").is_dir()
    shutil.rmtree(place)
    place.symlink_to(outside)
    with pytest.raises(StoreError, match="is a link"):
        copy_folder(pulled.root, tmp_path / "model.gguf", INT4)
