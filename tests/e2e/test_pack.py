"""thinslice pack as a user types it, on the embedded model, within its budget."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

from tests.e2e.test_ceiling import memory_group, run_inside
from tests.warm_start import warm_thinslice
from thinslice.checkpoint.open import open_checkpoint
from thinslice.text.tokenizer import load_tokenizer
from thinslice.units import gib, parse_bytes


def test_packing_lives_within_the_least_budget_it_names(smollm2_path: Path, tmp_path: Path) -> None:
    """Killed by the kernel, the process would not exit with 0. The source's matrices are Q4_1,
    whose codes are kept; its head is quantised to int8."""
    out = tmp_path / "packed"
    arguments = ["pack", "smollm2", "--dtype", "int4", "--out", str(out), "--memory"]
    refused = run_inside(None, *arguments, "100MiB", stdin="")
    assert refused.returncode == 3
    assert "packing does not fit --memory 100MiB" in refused.stderr
    memory = refused.stderr.split("--memory ")[-1].strip()
    with memory_group(parse_bytes(memory)) as group:
        done = run_inside(group, *arguments, memory, stdin="")
        assert done.returncode == 0, (done.returncode, done.stderr)
    match = re.search(r"packed: int4, 9\d\.\d\d MiB from .* peak ([\d.]+) GiB", done.stderr)
    assert match, done.stderr
    assert float(match[1]) <= float(gib(parse_bytes(memory)))

    again = run_inside(None, *arguments, memory, stdin="")
    assert again.returncode == 0
    assert "holds this model as int4 already" in again.stderr
    shown = run_inside(None, "show", str(out), stdin="")
    assert re.search(r"weights +int4, head int8", shown.stdout)

    source, packed = open_checkpoint(smollm2_path), open_checkpoint(out)
    assert replace(packed.shape, eos_token_ids=source.shape.eos_token_ids) == source.shape
    assert packed.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "int4m"
    before, after = load_tokenizer(source), load_tokenizer(packed)
    assert before.special == after.special
    # The source names one end; the others are known by their texts.
    assert {*packed.shape.eos_token_ids} == {*before.special.eos_token_ids}
    text = "<|im_start|>user\nWhy is the sky blue? नमस्ते 🙂<|im_end|>\n"
    ids = before.encode(text, add_special_tokens=True)
    assert after.encode(text, add_special_tokens=True) == ids
    assert after.decode(ids) == before.decode(ids)
    assert after.chat_template is not None
    assert before.chat_template is not None
    messages = [{"role": "user", "content": "Hello"}]
    assert after.chat_template.render(messages) == before.chat_template.render(messages)
    record = json.loads((out / "thinslice.json").read_text())
    assert record["settings"]["source"] == "smollm2"


def test_wrong_options_are_one_line_each(tmp_path: Path) -> None:
    for arguments, code in (
        (["smollm2", "--dtype", "int5", "--out", str(tmp_path / "out")], 2),
        (["smollm2", "--dtype", "int4"], 2),
        (["smollm2", "--dtype", "int4", "--out", str(tmp_path), "--memory", "8G"], 2),
        ([str(tmp_path), "--dtype", "int4", "--out", str(tmp_path / "out")], 4),
    ):
        refused = subprocess.run(
            [*warm_thinslice(), "pack", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == code, refused.stderr
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
