"""What a user sees of --device cuda: with the twin in the card's place, and without a card."""

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from tests.cuda.twin_device import TwinDevice
from tests.engines import engine_of, greedy
from tests.tiny_llm import write_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.cli import machine
from thinslice.cli.app import main
from thinslice.config import EngineSettings, SamplingParams
from thinslice.engine.llm import LLM
from thinslice.errors import BudgetError, ConfigError
from thinslice.memory import cuda_device, nvml
from thinslice.memory import device as device_module
from thinslice.memory.device import missing_for_cuda
from thinslice.units import GIB, MIB


@pytest.fixture(autouse=True)
def _no_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> TwinDevice:
    """A device that --device cuda opens."""
    device = TwinDevice()
    monkeypatch.setattr(cuda_device, "missing", lambda: None)
    monkeypatch.setattr(cuda_device, "CudaDevice", lambda: device)
    return device


def test_a_model_runs_from_name_to_tokens(twin: TwinDevice, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    settings = {"memory": "600MiB", "dtype": "float32", "draft": "off", "max_num_seqs": 1}
    llm = LLM(str(path), device="cuda", host_memory="4GiB", **settings)
    assert twin.held_to == llm.plan.budget_bytes == 600 * MIB
    assert dict(llm.plan.parts)["context"] == twin.context_bytes
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    completion = llm.generate("The sky", params)[0]
    prompt = completion.prompt_token_ids
    expected = greedy(engine_of(open_checkpoint(path), "float32"), list(prompt), 4)
    assert list(completion.token_ids) == expected
    llm.engine.runner.close()


def test_the_last_line_shows_both_peaks(
    twin: TwinDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    arguments = ["run", str(path), "Hi", "--device", "cuda", "--dtype", "float32", "--draft", "off"]
    with pytest.raises(SystemExit) as exit_code:
        main([*arguments, "--max-tokens", "2", "--memory", "600MiB", "--host-memory", "4GiB"])
    assert exit_code.value.code == 0
    shown = capsys.readouterr().err
    assert "of 0.59 GiB" in shown
    assert "on cuda, " in shown
    assert "of 4.00 GiB" in shown


def test_a_plan_shows_both_sides(
    twin: TwinDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--device", "cuda", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["parts"]["context"] == twin.context_bytes
    assert dict(report["device"]["host_parts"])["runtime"] > 0
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--device", "cuda"])
    shown = capsys.readouterr().out
    assert "ON THE HOST" in shown
    assert "allocator" in shown


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"memory": "310MiB"}, "memory="), ({"host_memory": "64MiB"}, "host_")],
)
def test_below_the_floor_the_need_is_named_and_what_fits_does(
    twin: TwinDevice, tmp_path: Path, settings: dict[str, str], text: str
) -> None:
    path = str(write_model(tmp_path / "tiny.gguf"))
    with pytest.raises(BudgetError, match=text) as caught:
        LLM(path, device="cuda", dtype="bfloat16", **settings)
    name, size = re.findall(r'(\w+)="(\w+)"$', str(caught.value), re.MULTILINE)[-1]
    LLM(path, device="cuda", dtype="bfloat16", **{name: size}).engine.runner.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_more_than_the_device_has_is_refused(twin: TwinDevice, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    with pytest.raises(BudgetError, match="is more than the device has"):
        LLM(str(path), device="cuda", memory="2GiB", host_memory="4GiB")


def test_without_a_card_one_line_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_model(tmp_path / "tiny.gguf"))
    with pytest.raises(SystemExit) as exit_code:
        main(["run", path, "Hi", "--device", "cuda"])
    assert exit_code.value.code == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("error: --device cuda: ")


def test_what_is_missing_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA card" in str(missing_for_cuda())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_device, "find_spec", lambda name: None)
    assert "Triton" in str(missing_for_cuda())
    monkeypatch.setattr(cuda_device, "find_spec", find_spec)
    monkeypatch.setattr(nvml, "_LIBRARY", "no-such-library.so")
    assert "no-such-library.so" in str(missing_for_cuda())
    monkeypatch.setattr(nvml, "_LIBRARY", None)  # the process itself, which can be opened
    assert missing_for_cuda() is None
    monkeypatch.setattr(device_module, "find_spec", lambda name: None)
    assert "torch" in str(missing_for_cuda())


def test_a_torch_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError("libcudart.so.13: cannot open shared object file\nSee the notes")

    monkeypatch.setattr(device_module, "import_module", broken)
    assert str(missing_for_cuda()).endswith("libcudart.so.13: cannot open shared object file")


def test_cards_are_told_with_what_computes_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_for_cuda", lambda: None)
    monkeypatch.setattr(cuda_device, "cards", lambda: [("H200", 140 * GIB), ("T4", 15 * GIB)])
    findings = {finding.name: finding.value for finding in machine._devices()}
    assert findings["torch"] == torch.__version__
    assert findings["Triton"] == triton.__version__
    assert findings["GPU 0"] == "H200, 140.0 GiB; for --device cuda"
    assert findings["GPU 1"].startswith("T4, 15.0 GiB")


def test_options_that_cannot_take_effect_are_refused(twin: TwinDevice, tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "tiny.gguf"))
    with pytest.raises(ConfigError, match="--host-memory"):
        EngineSettings(host_memory="1GiB")
    with pytest.raises(ConfigError, match="mtp"):
        LLM(path, device="cuda", draft="mtp")
    with pytest.raises(ConfigError, match="mtp_hidden"):
        LLM(path, device="cuda", mtp_hidden="post-norm")
    with pytest.raises(ConfigError, match="int8"):
        LLM(path, device="cuda", kv_dtype="int8")
