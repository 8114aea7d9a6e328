"""Train the small test model: MiMo's exact format, a megabyte, a prediction layer that drafts well.

    python tools/train_small_mtp.py --out tests/models/small_mtp

The loss is next-token cross-entropy over the answers, plus that of the prediction layer times
MTP_WEIGHT, as in MiMo's pretraining (arXiv 2505.07608). The layer is trained on its own output too,
NUM_CHAINED drafts in a row as a drafter makes them, as FastMTP does (arXiv 2509.18362). One seed
decides everything; the same torch on the same kind of processor with as many threads writes the
same bytes. About fifteen minutes on one free core, 1 GiB.

The folder holds the checkpoint and training.json: seed, settings, loss curve and acceptance.
Nothing is written unless thinslice's own decoder gives the trained model's logits.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import ConfigError, ThinsliceError
from thinslice.kernels import torch_ops
from thinslice.kernels.ops import RotaryTables
from thinslice.kernels.paged_kv import PagedKv
from thinslice.kernels.rotary import Rotary
from thinslice.kernels.torch_ops import TORCH, tensor_of
from thinslice.memory.resident import LoadedDtypes, ResidentWeights, load_resident
from thinslice.model.batch import TokenRun, pack
from thinslice.model.decoder import Decoder
from thinslice.model.mtp import PredictionLayer
from thinslice.model.weights import Weights
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.plan.tensors import EMBEDDING
from thinslice.text.tokenizer import BYTE_TO_CHARACTER
from tools.small_mtp_text import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    THINK,
    THOUGHT,
    TURN_END,
    examples,
    training_rows,
)

MTP_WEIGHT = 0.3
NUM_CHAINED = 3
NUM_EVALUATED, LONGEST_ANSWER = 200, 96
IGNORED = -100  # cross_entropy's default for targets that do not count
# Every matrix has rows of whole quantization groups of 32. The vocabulary is padded, as MiMo's is.
CONFIG: dict[str, Any] = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 512,
    "model_type": "mimo",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 288,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        rows, length: rows of a batch and tokens each row predicts.
        learning_rate: the highest; reached after ``warmup`` steps, then a cosine to zero.
    """

    seed: int = 0
    steps: int = 1500
    rows: int = 16
    length: int = 192
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    threads: int = 1


# Cosine and sine; K and V of the first draft's rows, of the second's, and so on.
Chain = list[tuple[torch.Tensor, torch.Tensor]]


class Norm(nn.Module):
    """RMSNorm that trains."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention over whole rows [B, T, D].

    With a ``chain`` the rows are those of a prediction layer's drafts, of each row one more than
    before: K and V are added to it, and a row attends to what a drafter has in its cache then.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        size, self.head_dim = shape.hidden_size, shape.head_dim
        self.groups = shape.num_attention_heads // shape.num_key_value_heads
        self.q_proj = nn.Linear(size, shape.q_size)
        self.k_proj = nn.Linear(size, shape.kv_size)
        self.v_proj = nn.Linear(size, shape.kv_size)
        self.o_proj = nn.Linear(shape.q_size, size, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: RotaryTables, chain: Chain | None = None
    ) -> torch.Tensor:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        q, k = torch_ops.apply_rotary(q, *rotary), torch_ops.apply_rotary(k, *rotary)
        k, v = (part.repeat_interleave(self.groups, dim=2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if chain is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            chain.append((k, v))
            k, v = (torch.cat(parts, dim=2) for parts in zip(*chain, strict=True))
            out = F.scaled_dot_product_attention(q, k, v, _chain_mask(x.shape[1], len(chain)))
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _chain_mask(length: int, depth: int) -> torch.Tensor:
    """What the rows of draft ``depth`` attend to: rows of certain tokens up to where the drafts
    began, and one of each draft since. [T, depth T]."""
    diagonals = [torch.ones(length - depth + 1 + i).diag(1 + i - depth) for i in range(1, depth)]
    certain = torch.ones(length, length).tril(1 - depth)
    return torch.cat([certain, *diagonals], dim=1).bool()


class MLP(nn.Module):
    """SwiGLU that trains."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        size, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A decoder block over whole rows."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(shape), Norm(shape)
        self.self_attn, self.mlp = Attention(shape), MLP(shape)

    def forward(
        self, x: torch.Tensor, rotary: RotaryTables, chain: Chain | None = None
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, chain)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTPBlock(Block):
    """The prediction layer over whole rows."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.token_layernorm, self.hidden_layernorm = Norm(shape), Norm(shape)
        self.final_layernorm = Norm(shape)
        self.input_proj = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)


class Trunk(nn.Module):
    """What checkpoints call ``model``."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape)
        self.mtp_layers = nn.ModuleList(
            MTPBlock(shape) for _ in range(shape.num_nextn_predict_layers)
        )


class CausalModel(nn.Module):
    """The weights of a whole model; its state dict has the checkpoint's names."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


class TrainedModel(CausalModel):
    """The whole model with its prediction layer."""

    def forward(
        self, ids: torch.Tensor, num_chained: int = NUM_CHAINED
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of rows [B, T + 1]: of the tokens after each but the last, [B, T, V], and the
        prediction layer's of the tokens after those: as first draft, as second one, and so on.

        The first of the rows have no second draft, and the first two no third.
        """
        length = ids.shape[1] - 1
        cos, sin = Rotary(self.shape).tables(np.arange(length))
        rotary = tensor_of(cos), tensor_of(sin)
        embeddings = self.model.embed_tokens(ids)
        x = embeddings[:, :-1]
        for layer in self.model.layers:
            x = layer(x, rotary)
        logits = self.lm_head(self.model.norm(x))
        (mtp,) = self.model.mtp_layers
        token = mtp.token_layernorm(embeddings[:, 1:])
        chain: Chain = []
        drafted = []
        for _ in range(num_chained):
            pair = torch.cat((mtp.hidden_layernorm(x), token), dim=-1)
            out = mtp.final_layernorm(mtp(mtp.input_proj(pair), rotary, chain))
            drafted.append(self.lm_head(out))
            x = F.pad(out[:, :-1], (0, 0, 1, 0))  # each row takes the output of the one before
        return logits, drafted


def train(settings: Settings) -> tuple[TrainedModel, list[dict[str, float]]]:
    """A trained model, rounded to bfloat16's values, and the loss curve."""
    torch.manual_seed(settings.seed)
    model = TrainedModel(shape_from_config(CONFIG))
    source = training_rows(random.Random(settings.seed), settings.length + 2)

    def losses() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        main_loss, mtp_losses = _losses(model, list(islice(source, settings.rows)))
        named = {f"mtp_{number}": loss for number, loss in enumerate(mtp_losses, 1)}
        return main_loss + MTP_WEIGHT * mtp_losses.sum(), {"main": main_loss, **named}

    return model, fit(model, settings, losses)


def fit(
    model: CausalModel,
    settings: Settings,
    losses: Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> list[dict[str, float]]:
    """Train a model in place and round it to bfloat16's values; the loss curve.

    Args:
        losses: of the next rows: what is made small, and what the curve tells.
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, settings)
    )
    curve = []
    started = time.monotonic()
    for step in range(1, settings.steps + 1):
        loss, told = losses()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % 50 == 0:
            curve.append(
                {"step": step, **{name: round(one.item(), 4) for name, one in told.items()}}
            )
            print(f"{time.monotonic() - started:6.0f} s  {curve[-1]}", file=sys.stderr)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.eval()
    return curve


def learning_rate_share(step: int, settings: Settings) -> float:
    """The share of the highest learning rate at a step."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _losses(
    model: TrainedModel, rows: list[tuple[list[int], list[bool]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers' tokens: the main model's, and that of each draft."""
    ids = torch.tensor([row for row, _ in rows])
    is_answer = torch.tensor([flags for _, flags in rows])
    targets = torch.where(is_answer, ids, IGNORED)
    logits, drafted = model(ids[:, :-1])
    losses = [
        F.cross_entropy(one[:, first:].flatten(0, 1), targets[:, 2 + first :].flatten())
        for first, one in enumerate(drafted)
    ]
    main_loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:-1].flatten())
    return main_loss, torch.stack(losses)


@torch.inference_mode()
def continue_greedily(model: TrainedModel, prompt: list[int], count: int) -> list[int]:
    """The prompt and its most likely continuation, to an end token or for ``count`` tokens."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] not in (END_OF_TEXT, TURN_END):
        # The last token only stands for the next one, which the main logits do not see.
        logits, _ = model(torch.tensor([[*ids, 0]]), num_chained=0)
        ids.append(int(logits[0, -1].argmax()))
    return ids


@torch.inference_mode()
def evaluate(model: TrainedModel, count: int, seed: int) -> dict[str, float]:
    """Over held-out prompts: the share of exact answers, and of the prediction layer's tokens that
    are the main model's own, of each kind of example and of all; and of second drafts and further
    ones, where those before them are right."""
    exact: dict[str, list[bool]] = {}
    accepted: list[dict[str, list[bool]]] = [{} for _ in range(NUM_CHAINED)]
    for example in islice(examples(random.Random(seed), held_out=True), count):
        prompt = example.prompt_ids
        ids = continue_greedily(model, prompt, LONGEST_ANSWER)
        exact.setdefault(example.kind, []).append(ids[len(prompt) :] == example.answer_ids)
        _, drafted = model(torch.tensor([ids]))
        for first, logits in enumerate(drafted):
            drafts = logits[0].argmax(-1).tolist()
            # Row p drafts token p + 2; the first draft follows the continuation's first token.
            rows = range(len(prompt) + 1 + first, len(ids))
            outcome = [drafts[place - 2] == ids[place] for place in rows]
            accepted[first].setdefault(example.kind, []).extend(outcome)
    results = _shares("exact", exact)
    for first, outcomes in enumerate(accepted, 1):
        results |= _shares(f"acceptance_{first}", outcomes)
    return results


def _shares(name: str, outcomes: dict[str, list[bool]]) -> dict[str, float]:
    everything = [one for outcome in outcomes.values() for one in outcome]
    shares = {f"{name}_{kind}": values for kind, values in sorted(outcomes.items())}
    return {key: round(sum(v) / len(v), 4) for key, v in {name: everything, **shares}.items()}


class TorchWeights(ResidentWeights):
    """The weights of a checkpoint as torch's tensors."""

    def embed(self, token_ids_T: NDArray[np.int64]) -> torch.Tensor:
        """Rows of the embedding table, [T, D]."""
        return self.tensors[EMBEDDING][torch.from_numpy(token_ids_T)]


@torch.inference_mode()
def check_export(folder: Path, model: TrainedModel) -> None:
    """Load the folder with thinslice and compare the logits of a row with the trained model's.

    Errors: AssertionError where they differ by more than assert_close allows.
    """
    checkpoint = open_checkpoint(folder)
    shape = checkpoint.shape
    with CheckpointReader(checkpoint) as reader:
        dtypes = LoadedDtypes(np.dtype(np.float32), np.dtype(np.float32))
        loaded = load_resident(reader, dtypes, has_predictions=True).tensors
    source = TorchWeights({name: tensor_of(one) for name, one in loaded.items()})
    decoder, weights = Decoder(shape), Weights(shape, source, TORCH, has_predictions=True)
    row, _ = next(training_rows(random.Random(1), 128))
    batch = pack([TokenRun(row[:-1], 0, [0])], block_size=128).to(tensor_of)
    size = (1, shape.num_key_value_heads, 128, shape.head_dim)
    caches = [
        PagedKv(torch.zeros(size), torch.zeros(size)) for _ in range(shape.num_hidden_layers + 1)
    ]
    hidden = decoder.forward(batch, weights, caches[:-1])
    layer = PredictionLayer(decoder, weights, 0, caches[-1])
    out = layer.predict(hidden, weights.embed(np.array(row[1:])), batch)
    logits, drafted = model(torch.tensor([row]))
    torch.testing.assert_close(tensor_of(decoder.logits(hidden, weights)), logits[0])
    torch.testing.assert_close(weights.ops.linear(out, weights.head), drafted[0][0])


def write_tokenizer(folder: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """A byte-level tokenizer without merges: token b is byte b."""
    vocab = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    texts = (THINK, THOUGHT)  # text to whoever reads the completion
    backend.add_tokens(
        [
            AddedToken(content, special=token_id not in texts, normalized=False)
            for content, token_id in SPECIAL_TOKENS.items()
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"chat_template": chat_template, "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: object) -> None:
    """Indented, as transformers writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make(out: Path, settings: Settings) -> None:
    """Train and write the folder, under another name until it is whole.

    Errors: ConfigError if it exists.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    model, curve = train(settings)
    results = evaluate(model, NUM_EVALUATED, settings.seed)
    print(json.dumps(results, indent=2), file=sys.stderr)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        tensors = {name: value.bfloat16() for name, value in model.state_dict().items()}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", CONFIG)
        write_tokenizer(part)
        record = {"settings": asdict(settings), "torch": torch.__version__, "results": results}
        write_json(part / "training.json", {**record, "mtp_weight": MTP_WEIGHT, "losses": curve})
        check_export(part, model)
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
    parser.add_argument("--seed", default=Settings.seed, type=int)
    parser.add_argument("--steps", default=Settings.steps, type=int)
    given = vars(parser.parse_args(arguments))
    try:
        make(given.pop("out"), Settings(**given))
    except ThinsliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
