"""One measurement of a peer that is a Python library; runs in the peers' own environment.

    python -P run_peer.py transformers-gguf MODEL.gguf --prompt-tokens 8 --new-tokens 32

(-P: transformers looks for a package named kernels, and would find kernels.py beside this file.)

Prints one JSON line: seconds of the first token and of those after it. Imports nothing of
thinslice. Each library is used as its own documentation does, greedily, on the CPU.
"""

# ruff: noqa: PLC0415 -- each kind loads its own library and none of the others

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A measurement needs no network; without this a library may look for newer files of a local one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Timing = dict[str, Any]


class TokenClock:
    """A streamer of transformers that notes when each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def timing(self, start: float) -> Timing:
        """As run_thinslice.py has it."""
        first, last = self.times[1], self.times[-1]
        return {
            "prefill_s": first - start,
            "decode_s": last - first,
            "decode_tokens": len(self.times) - 2,
        }


def generate(model: Any, vocab_size: int, options: argparse.Namespace) -> Timing:
    """Greedy generation with a model of transformers, or one that behaves as such."""
    import torch

    def run(num_tokens: int, seed: int) -> Timing:
        generator = torch.Generator().manual_seed(seed)
        sizes = (1, options.prompt_tokens)
        ids = torch.randint(0, vocab_size, sizes, generator=generator)
        clock, start = TokenClock(), time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            streamer=clock,
        )
        return clock.timing(start)

    with torch.inference_mode():
        if not options.no_warm_up:
            run(2, seed=1)
        return run(options.new_tokens, seed=0)


def transformers_gguf(options: argparse.Namespace) -> Timing:
    """transformers in bfloat16 from a GGUF, whose blocks it turns into numbers as it loads."""
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    return generate(model, model.config.vocab_size, options)


def transformers_random(options: argparse.Namespace) -> Timing:
    """The prefill of a random model in bfloat16 with the sizes of a config.json.

    Some of its layers may stand for all: layers are alike, so their time is scaled by how many
    there are, while embedding, norm and head are measured once, as they are.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    fields = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    num_layers = fields["num_hidden_layers"]
    used = min(options.layers or num_layers, num_layers)
    for name in ("model_type", "architectures", "rope_scaling", "torch_dtype"):
        fields.pop(name, None)
    config = Qwen2Config(**{**fields, "num_hidden_layers": used, "layer_types": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    pool = torch.empty(1 << 24, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
    for parameter in model.parameters():
        for piece in parameter.data.view(-1).split(len(pool)):
            piece.copy_(pool[: len(piece)])
    # Its frequencies are not parameters: they follow from the config, and `to_empty` lost them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    spent = {"layers": 0.0}
    time_layers(model.model.layers, spent)
    with torch.inference_mode():
        ids = torch.randint(0, config.vocab_size, (1, options.prompt_tokens))
        model(ids, use_cache=True, logits_to_keep=1)
        spent["layers"] = 0.0
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        whole = time.perf_counter() - start
    scaled = whole - spent["layers"] + spent["layers"] * num_layers / used
    return {"prefill_s": scaled, "layers": used, "of_layers": num_layers}


def time_layers(layers: Any, spent: dict[str, float]) -> None:
    """Add what the layers take together to ``spent["layers"]``."""
    starts: list[float] = []
    layers[0].register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    layers[-1].register_forward_hook(
        lambda *_: spent.update(layers=spent["layers"] + time.perf_counter() - starts.pop())
    )


def openvino(options: argparse.Namespace) -> Timing:
    """OpenVINO GenAI from the same GGUF, on the CPU."""
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    threads = {"INFERENCE_NUM_THREADS": options.threads} if options.threads else {}
    pipeline = openvino_genai.LLMPipeline(options.model, "CPU", **threads)
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True

    def run(num_tokens: int, seed: int) -> Timing:
        # Ids that every vocabulary has, none of them special.
        draw = np.random.default_rng(seed)
        ids = draw.integers(1000, 30000, (1, options.prompt_tokens), dtype=np.int64)
        config.max_new_tokens = num_tokens
        metrics = pipeline.generate(Tensor(ids), config).perf_metrics
        num_decoded = metrics.get_num_generated_tokens() - 1
        return {
            "prefill_s": metrics.get_ttft().mean / 1000,
            "decode_s": metrics.get_tpot().mean / 1000 * num_decoded,
            "decode_tokens": num_decoded,
        }

    run(2, seed=1)
    return run(options.new_tokens, seed=0)


def accelerate(options: argparse.Namespace) -> Timing:
    """transformers with accelerate's disk offload: what fits stays, the rest is read each time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": options.resident},
        offload_folder=options.folder,
    )
    return generate(model, model.config.vocab_size, options)


def airllm_split(options: argparse.Namespace) -> Timing:
    """Write the folder of one file for each layer that AirLLM reads, as its first use does."""
    from airllm.utils import split_and_save_layers

    start = time.perf_counter()
    split_and_save_layers(options.model, options.folder)
    return {"split_s": time.perf_counter() - start}


def airllm(options: argparse.Namespace) -> Timing:
    """AirLLM on the CPU: one layer after the other is read and forgotten."""
    from airllm import AutoModel

    model = AutoModel.from_pretrained(
        options.model, device="cpu", layer_shards_saving_path=options.folder
    )
    return generate(model, model.config.vocab_size, options)


KINDS: dict[str, Callable[[argparse.Namespace], Timing]] = {
    "transformers-gguf": transformers_gguf,
    "transformers-random": transformers_random,
    "openvino": openvino,
    "accelerate": accelerate,
    "airllm-split": airllm_split,
    "airllm": airllm,
}


def main() -> None:
    """Read the arguments, measure, print on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, help="of a random model; all where not given")
    parser.add_argument("--folder", help="accelerate's, or AirLLM's, own files")
    parser.add_argument("--resident", default="1GiB", help="what accelerate may keep in memory")
    parser.add_argument("--no-warm-up", action="store_true")
    options = parser.parse_args()
    if options.threads and options.kind != "openvino":
        import torch

        torch.set_num_threads(options.threads)
    result = KINDS[options.kind](options)
    sys.stdout.flush()
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
