"""Train the small thinking model: it thinks between tags, for as long as its task is, and answers.

    python tools/train_small_thinker.py --out tests/models/small_thinker

The layers and the format are those of train_small_mtp.py, without a prediction layer; the text is
that of small_thinker_text.py. The template opens no thought: the model does, as Qwen3 and MiMo do.
One seed decides everything. About five minutes on one core, 1 GiB.

The folder holds the checkpoint and training.json: seed, settings, loss curve and the share of right
answers.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from thinslice.errors import ConfigError, ThinsliceError
from thinslice.kernels.rotary import Rotary
from thinslice.kernels.torch_ops import tensor_of
from thinslice.plan.shape_from_config import shape_from_config
from tools.small_mtp_text import TURN_END
from tools.small_thinker_text import prompts, training_rows
from tools.train_small_mtp import CONFIG as MTP_CONFIG
from tools.train_small_mtp import (
    IGNORED,
    CausalModel,
    Settings,
    fit,
    write_json,
    write_tokenizer,
)

NUM_EVALUATED, LONGEST_ANSWER = 40, 320
CONFIG: dict[str, Any] = {**MTP_CONFIG, "num_hidden_layers": 3, "num_nextn_predict_layers": 0}
# With enable_thinking as Qwen3's template has it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DEFAULTS = Settings(steps=450, rows=12, length=384, warmup=60)


class ThinkingModel(CausalModel):
    """The whole model, without a prediction layer."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of rows [B, T]."""
        cos, sin = Rotary(self.shape).tables(np.arange(ids.shape[1]))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, (tensor_of(cos), tensor_of(sin)))
        logits: torch.Tensor = self.lm_head(self.model.norm(x))
        return logits


def train(settings: Settings) -> tuple[ThinkingModel, list[dict[str, float]]]:
    """A trained model, rounded to bfloat16's values, and the loss curve."""
    torch.manual_seed(settings.seed)
    model = ThinkingModel(shape_from_config(CONFIG))
    source = training_rows(random.Random(settings.seed), settings.length + 1)

    def losses() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = _loss(model, list(islice(source, settings.rows)))
        return loss, {"loss": loss}

    return model, fit(model, settings, losses)


def _loss(model: ThinkingModel, rows: list[tuple[list[int], list[bool]]]) -> torch.Tensor:
    """Cross-entropy of the tokens that are to be learned."""
    ids = torch.tensor([row for row, _ in rows])
    is_learned = torch.tensor([flags for _, flags in rows])
    targets = torch.where(is_learned, ids, IGNORED)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: ThinkingModel, seed: int) -> dict[str, float]:
    """The share of held-out prompts whose thought and answer are right to the last token."""
    num_right = 0
    for example in islice(prompts(random.Random(seed), held_out=True), NUM_EVALUATED):
        ids = list(example.chat_prompt_ids)
        start = len(ids)
        while len(ids) < start + LONGEST_ANSWER and ids[-1] != TURN_END:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        num_right += ids[start:] == example.chat_answer_ids
    return {"exact": round(num_right / NUM_EVALUATED, 4)}


def make(out: Path, settings: Settings) -> None:
    """Train and write the folder, under another name until it is whole.

    Errors: ConfigError if it exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    model, curve = train(settings)
    results = evaluate(model, settings.seed)
    print(json.dumps(results, indent=2), file=sys.stderr)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        tensors = {name: value.bfloat16() for name, value in model.state_dict().items()}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", CONFIG)
        write_tokenizer(part, CHAT_TEMPLATE)
        record = {"settings": asdict(settings), "torch": torch.__version__, "results": results}
        write_json(part / "training.json", {**record, "losses": curve})
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and train; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--seed", default=DEFAULTS.seed, type=int)
    parser.add_argument("--steps", default=DEFAULTS.steps, type=int)
    given = vars(parser.parse_args(arguments))
    try:
        make(given.pop("out"), Settings(**{**asdict(DEFAULTS), **given}))
    except ThinsliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
