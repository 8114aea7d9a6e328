"""thinslice on a CUDA card: against accelerate and transformers, the link, and the card's memory.

    python benchmarks/cuda_card.py

Three comparisons on MiMo-7B's shape with random weights, each run in a process of its own, the
contestants in turn: bfloat16 in 6 GiB of device memory from host memory against accelerate's
offload to the CPU and against the measured link; int4 decode against the measured bandwidth of the
card's memory; and tokens/s per GiB of device memory against transformers in bfloat16, at batch 1
and 8. Ends in one JSON line. Exit code 1 for a missed target, 2 where there is no card.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT
from thinslice.checkpoint.open import open_checkpoint
from thinslice.engine.planning import Model
from thinslice.memory.cuda_device import CudaDevice
from thinslice.memory.device import missing_for_cuda
from thinslice.memory.measure_device import measure_device
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.weight_layout import WeightLayout
from thinslice.store.store import Store
from thinslice.units import GIB, MIB

Report = dict[str, Any]
DEVICE_BUDGET = "6GiB"
PROMPT_TOKENS = 32
# Least shares and ratios; a link that is always busy gives 1.
LEAST_LINK_SHARE, LEAST_MEMORY_SHARE, LEAST_PER_GIB, LEAST_OFFLOAD = 0.85, 0.7, 1.4, 1.0


def make_models(folder: Path) -> tuple[Path, Path]:
    """The random checkpoint and its int4 copy; each is made once."""
    source, packed = folder / "mimo-7b", folder / "mimo-7b-int4"
    tools = ROOT / "tools"
    tokenizer = ["--tokenizer", Store().ensure("smollm2")]
    for path, tool in ((source, "make_checkpoint.py"), (packed, "make_packed.py")):
        if not path.exists():
            command = [sys.executable, tools / tool, "--shape", "mimo-7b", *tokenizer]
            subprocess.run([*command, "--out", path], check=True, cwd=ROOT)
    return source, packed


def last_line(command: list[Any]) -> Report:
    """Run a command; the JSON of the last line it prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


def ours(model: Path, dtype: str, batch: int, options: argparse.Namespace) -> Report:
    """thinslice bench; --memory only where the budget is the matter."""
    command = [sys.executable, "-m", "thinslice", "bench", model, "--device", "cuda", "--json"]
    command += ["--dtype", dtype, "--draft", "off", "--sequences", batch]
    command += ["--prompt-tokens", PROMPT_TOKENS, "--completion-tokens", options.new_tokens]
    if dtype == "bfloat16":
        command += ["--memory", DEVICE_BUDGET, "--host-memory", options.host_memory]
    return last_line([str(one) for one in command])


def theirs(model: Path, memory: str | None, batch: int, options: argparse.Namespace) -> Report:
    """transformers in a process of its own, with accelerate's offload where memory is named."""
    command = [sys.executable, "-m", "benchmarks.cuda_card", "--peer", model, "--batch", batch]
    command += ["--new-tokens", options.new_tokens]
    if memory is not None:
        command += ["--peer-memory", memory]
    return last_line([str(one) for one in command])


def run_peer(options: argparse.Namespace) -> Report:
    """One run of transformers: decode tokens/s of the batch, and the device's peak."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 -- the peer's process alone

    device = CudaDevice()  # first: what is in use on the card already is not the peer's
    # accelerate counts weights only: context and activations are given their room beside them.
    limits = {0: options.peer_memory, "cpu": "1000GiB"} if options.peer_memory else None
    model = AutoModelForCausalLM.from_pretrained(
        options.peer, dtype=torch.bfloat16, device_map="auto" if limits else 0, max_memory=limits
    )
    ids = torch.randint(0, 1000, (options.batch, PROMPT_TOKENS), device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)
    decode_s = seconds(options.new_tokens + 1) - seconds(1)
    return {
        "decode_tokens_per_s": options.batch * options.new_tokens / decode_s,
        "device_peak_bytes": device.peak_bytes(),
    }


def streamed_bytes(report: Report) -> int:
    """What a sweep copies over the link: the slices that are not on the device."""
    streaming = StreamingPlan(**report["plan"]["streaming"])
    pinned = frozenset(streaming.pinned())
    slices = layout_of_run(report).slices(streaming.slice_bytes)
    return sum(one.kept_bytes for index, one in enumerate(slices) if index not in pinned)


def swept_bytes(report: Report) -> int:
    """What a sweep reads of the device's memory: every matrix of a layer, and the head."""
    return sum(one.kept_bytes(one.rows) for one in layout_of_run(report).sweep)


def layout_of_run(report: Report) -> WeightLayout:
    """The matrices of the model that was run; its prediction layer has no part in it."""
    model = Model.of(open_checkpoint(Path(report["model"])))
    return model.layout(report["plan"]["dtype"]).without_prediction()


def per_gib(report: Report) -> float:
    """Tokens/s for each GiB of device memory held."""
    return float(report["decode_tokens_per_s"] / (report["device_peak_bytes"] / GIB))


def compare(source: Path, packed: Path, options: argparse.Namespace) -> Report:
    """All rounds; medians of what each gave."""
    device = CudaDevice()
    profile = measure_device(device, 256 * MIB)
    torch.cuda.empty_cache()
    rounds: list[Report] = []
    for _ in range(options.rounds):
        streamed = ours(source, "bfloat16", 1, options)
        offload = theirs(source, "4GiB", 1, options)
        one: Report = {
            "streamed_tokens_per_s": streamed["decode_tokens_per_s"],
            "offload_tokens_per_s": offload["decode_tokens_per_s"],
            "offload_peak_bytes": offload["device_peak_bytes"],
        }
        one["offload_ratio"] = one["streamed_tokens_per_s"] / one["offload_tokens_per_s"]
        copied_per_s = streamed_bytes(streamed) * streamed["decode_tokens_per_s"]
        one["link_share"] = copied_per_s / profile.host_to_device_bytes_per_s
        for batch in (1, 8):
            packed_run = ours(packed, "int4", batch, options)
            in_bfloat16 = theirs(source, None, batch, options)
            one[f"per_gib_ratio_{batch}"] = per_gib(packed_run) / per_gib(in_bfloat16)
            one[f"int4_tokens_per_s_{batch}"] = packed_run["decode_tokens_per_s"]
            if batch == 1:
                read_per_s = swept_bytes(packed_run) * packed_run["decode_tokens_per_s"]
                one["memory_share"] = read_per_s / profile.memory_read_bytes_per_s
        rounds.append(one)
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {
        "card": torch.cuda.get_device_name(),
        "host_to_device_bytes_per_s": profile.host_to_device_bytes_per_s,
        "memory_read_bytes_per_s": profile.memory_read_bytes_per_s,
        **medians,
        "misses": misses(medians),
    }


def misses(medians: Report) -> list[str]:
    """Figures below what they are to reach."""
    least = {
        "offload_ratio": LEAST_OFFLOAD,
        "link_share": LEAST_LINK_SHARE,
        "memory_share": LEAST_MEMORY_SHARE,
        "per_gib_ratio_1": LEAST_PER_GIB,
        "per_gib_ratio_8": LEAST_PER_GIB,
    }
    return [name for name, bound in least.items() if medians[name] < bound]


def main() -> int:
    """Read the arguments, run, print on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--host-memory", default="24GiB")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--peer", help="run transformers on this model instead, once")
    parser.add_argument("--peer-memory", help="of the device, for accelerate's offload")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    if (missing := missing_for_cuda()) is not None:
        print(f"benchmarks/cuda_card.py needs a CUDA card: {missing}", file=sys.stderr)
        return 2
    if options.peer:
        print(json.dumps(run_peer(options)))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    result = compare(*make_models(options.work.resolve()), options)
    print(json.dumps(result))
    return 1 if result["misses"] else 0


if __name__ == "__main__":
    sys.exit(main())
