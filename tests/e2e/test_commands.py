"""The commands around run: what they print, and that their numbers are those of the model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import tiny_config, write_safetensors_model
from tests.tiny_llm import write_model
from tests.warm_start import warm_thinslice
from thinslice.units import MIB

DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def thinslice(
    *arguments: str, home: Path | None = None, is_alone: bool = False
) -> subprocess.CompletedProcess[str]:
    """Args: is_alone: for what is said of memory: see warm_start."""
    command = [sys.executable, "-m", "thinslice"] if is_alone else warm_thinslice()
    env = dict(os.environ) if home is None else {**os.environ, "THINSLICE_HOME": str(home)}
    return subprocess.run(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=env,
    )


def test_ls_and_show_tell_size_licence_context_and_digest(smollm2_path: Path) -> None:
    listed = thinslice("ls")
    assert listed.returncode == 0
    row = next(line for line in listed.stdout.splitlines() if line.startswith("smollm2"))
    for part in ("93.81 MiB", "8192", "apache-2.0", "LlamaForCausalLM"):
        assert part in row
    shown = thinslice("show", "smollm2")
    assert f"sha256 {DIGEST}" in shown.stdout
    record = json.loads(thinslice("show", "smollm2", "--json").stdout)
    assert record["num_bytes"] == 98_362_432
    assert record["files"][0]["sha256"] == DIGEST
    assert json.loads(thinslice("ls", "--json").stdout)["models"][0]["name"] == "smollm2"


def test_keys_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path)
    path.write_bytes(path.read_bytes().replace(b".rope.freq_base", b".rope.freq_bass"))
    for command in (["run", str(path), "Hi", "--max-tokens", "1"], ["plan", str(path)]):
        done = thinslice(*command, "--memory", "600MiB")
        assert done.returncode == 0
        named = [line for line in done.stderr.splitlines() if "rope.freq_bass" in line]
        assert len(named) == 1
        assert named[0].endswith(".rope.freq_bass, which is not known to thinslice and not read")
        assert "freq_bass" not in done.stdout


def test_markers_of_a_template_that_are_no_tokens_are_named_once(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", "<|user|>{{ messages[0].content }}<|im_end|>")
    for command in (["run", str(path), "Hi", "--max-tokens", "1"], ["plan", str(path)]):
        done = thinslice(*command, "--memory", "600MiB")
        assert done.returncode == 0
        (named,) = [line for line in done.stderr.splitlines() if "<|user|>" in line]
        assert "the chat template writes <|user|>, which is no token" in named
        assert "<|user|>" not in done.stdout


def test_pack_and_compare_name_what_the_tokenizer_notes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", "<|user|>{{ messages[0].content }}<|im_end|>")
    text, folder = tmp_path / "text.txt", tmp_path / "packed"
    text.write_text("Two ducks swim past three geese.")
    note = "the chat template writes <|user|>, which is no token of this tokenizer"
    for memory in (["--memory", "1GiB"], []):
        done = thinslice("pack", str(path), "--dtype", "int8", "--out", str(folder), *memory)
        assert done.stderr.count(note) == 1, done.stderr
    compared = thinslice(
        "compare", str(path), str(folder), "--text", str(text), "--memory", "1GiB",
        "--context", "8",
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert f"A: {note}" in compared.stderr
    assert f"B: {note}" in compared.stderr
    assert note not in compared.stdout


def test_pack_says_of_a_folder_without_a_tokenizer_that_it_has_none(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path / "model", tiny_config())
    asked = ["pack", str(tmp_path / "model"), "--dtype", "int8", "--out", str(tmp_path / "out")]
    done = thinslice(*asked)
    assert done.returncode == 0, done.stderr
    assert "has no tokenizer.json" in done.stderr


def test_help_in_a_pipe_has_lines_that_can_be_read() -> None:
    shown = thinslice("run", "--help").stdout
    assert "Exit codes: 0 done" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_an_empty_store_says_what_fills_it(tmp_path: Path) -> None:
    assert "thinslice pull smollm2 fetches one" in thinslice("ls", home=tmp_path).stderr
    for command in (["rm", "smollm2"], ["show", "smollm2"], ["pull", "smollm2", "--offline"]):
        refused = thinslice(*command, home=tmp_path)
        assert refused.returncode == 6
        assert "smollm2 is not stored" in refused.stderr
    assert thinslice("run", "smollm2", "hi", "--offline", home=tmp_path).returncode == 6


def test_rm_removes_what_ls_showed(smollm2_path: Path, tmp_path: Path) -> None:
    models = tmp_path / "models" / "smollm2"
    models.mkdir(parents=True)
    for file in smollm2_path.parent.iterdir():
        (models / file.name).symlink_to(file) if file.suffix == ".gguf" else (
            models / file.name
        ).write_bytes(file.read_bytes())
    assert "smollm2" in thinslice("ls", home=tmp_path).stdout
    removed = thinslice("rm", "smollm2", home=tmp_path)
    assert removed.returncode == 0
    assert not models.exists()
    assert smollm2_path.exists(), "a link is removed, not what it points to"


def test_plan_shows_parts_that_add_up_and_neighbours(smollm2_path: Path) -> None:
    fit = ("--memory", "200MiB", "--context", "1024", "--dtype", "bfloat16")
    planned = thinslice("plan", "smollm2", *fit, is_alone=True)
    assert planned.returncode == 0, planned.stderr
    for part in (
        "runtime",
        "tokenizer",
        "weight ring",
        "headroom",
        "slices streamed",
        "tokens/s",
        "--dtype int4",
    ):
        assert part in planned.stdout
    thought = ("--max-thinking-tokens", "256")
    record = json.loads(
        thinslice("plan", "smollm2", *fit, *thought, "--json", is_alone=True).stdout
    )
    token = record["prediction"]["token"]
    assert record["thought_s"] >= 256 * (token["io_s"] + token["fixed_s"])
    assert sum(record["parts"].values()) == record["peak_bytes"] <= 200 * MIB
    assert 10 * MIB <= record["parts"]["tokenizer"] <= 35 * MIB
    assert record["prediction"]["bound"] in ("disk", "memory", "attention", "overhead")
    assert record["streaming"]["num_pinned"] < record["streaming"]["num_slices"]
    refused = thinslice("plan", "smollm2", "--memory", "60MiB", is_alone=True)
    assert refused.returncode == 3
    assert refused.stdout == ""


def test_plan_offline_uses_no_network(tmp_path: Path) -> None:
    done = thinslice("plan", "qwen3:4b", "--offline", home=tmp_path)
    assert done.returncode == 6
    assert "is not stored; `thinslice pull qwen3:4b` fetches it, but not offline" in done.stderr


def test_plan_without_a_disk_to_measure_has_no_speeds(smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = ("plan", str(smollm2_path), "--memory", "150MiB")
    planned = thinslice(*asked, home=tmp_path / "file" / "store", is_alone=True)
    assert planned.returncode == 0, planned.stderr
    assert planned.stderr.count("no speeds are predicted: ") == 1
    assert "cannot be made: " in planned.stderr
    assert "weight ring" in planned.stdout
    assert "tokens/s" not in planned.stdout
    record = json.loads(
        thinslice(*asked, "--json", home=tmp_path / "file" / "store", is_alone=True).stdout
    )
    assert record["prediction"] is None
    assert record["peak_bytes"] <= 150 * MIB


def test_doctor_finds_a_store_it_cannot_use(tmp_path: Path) -> None:
    works = thinslice("doctor", "--json")
    assert works.returncode == 0
    names = {finding["name"] for finding in json.loads(works.stdout)["findings"]}
    assert {"Python", "numpy", "cores", "memory", "compiled kernels", "model store"} <= names
    (tmp_path / "file").write_text("")
    broken = thinslice("doctor", home=tmp_path / "file")
    assert broken.returncode == 1
    assert "cannot be written" in broken.stdout


def test_markup_and_control_characters_in_names_are_shown_as_they_are() -> None:
    refused = thinslice("run", ":smile:[b]x[/b]", "hi")
    assert refused.returncode == 2
    assert ":smile:[b]x[/b]" in refused.stderr


def test_a_full_disk_behind_stdout_is_an_error_and_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "thinslice", "ls", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 6
    assert done.stderr == "error: cannot write the output: the disk is full\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_error(closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "thinslice", "ls"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_bench_tells_speed_and_memory(smollm2_path: Path) -> None:
    sizes = ("--prompt-tokens", "40", "--completion-tokens", "6", "--sequences", "3")
    done = thinslice("bench", "smollm2", "--memory", "2GiB", *sizes, "--json", is_alone=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["prompt_tokens"], record["completion_tokens"], record["sequences"]) == (40, 6, 3)
    assert 1.0 < record["tokens_per_sweep"] <= 3.0
    assert record["steps"] >= 6
    assert 0 < record["time_to_first_token_s"] <= record["last_time_to_first_token_s"]
    assert 0 < record["peak_bytes"] <= record["planned_bytes"] <= record["budget_bytes"]
    documented = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert [name for name in record if f"`{name}`" not in documented] == []


def test_bench_streamed_tells_what_a_sweep_reads(smollm2_path: Path, is_long: bool) -> None:
    sizes = ("--prompt-tokens", "8", "--completion-tokens", "2", "--memory", "240MiB")
    sizes += ("--dtype", "bfloat16")
    record = json.loads(thinslice("bench", "smollm2", *sizes, "--json", is_alone=True).stdout)
    assert record["plan"]["streaming"] is not None
    assert record["streamed_bytes_per_sweep"] > 10 * MIB
    assert 0 <= record["slice_wait_share"] <= 1
    if is_long:
        assert "streamed per sweep" in thinslice("bench", "smollm2", *sizes).stdout


def test_bench_refuses_sizes_that_make_no_sense(smollm2_path: Path) -> None:
    refused = thinslice("bench", "smollm2", "--sequences", "0")
    assert refused.returncode == 2
    assert "--sequences is 0; expected 1 or more" in refused.stderr
    sizes = "--prompt-tokens 9000 and --completion-tokens 64 (9064 together)"
    refused = thinslice("bench", "smollm2", "--prompt-tokens", "9000")
    assert refused.returncode == 2
    assert f"error: {sizes} is out of range; this model has 1..8192" in refused.stderr
    refused = thinslice("bench", "smollm2", "--prompt-tokens", "9000", "--context", "9001")
    assert "error: --context 9001 is out of range" in refused.stderr
    refused = thinslice("bench", "smollm2", "--prompt-tokens", "7000", "--memory", "150MiB")
    assert refused.returncode == 3
    assert "at --prompt-tokens 7000 and --completion-tokens 64 (7064 together)" in refused.stderr
    (shorter,) = re.findall(r"^    --prompt-tokens (\d+)$", refused.stderr, re.MULTILINE)
    assert (int(shorter) + 64) % 16 == 0
    assert "--context" not in refused.stderr
