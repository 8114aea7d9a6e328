"""Write a random tokenizer.json as large as a published one, for tests and measurements.

    python -m tools.make_vocabulary --tokens 151680 --out DIR

It is byte-level BPE, split as Qwen2 splits text: single bytes, then tokens made of two earlier ones
each, the earliest the likeliest, and three control tokens at the end. Takes about two seconds.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from thinslice.text.gguf_tokenizer import build_gguf_tokenizer
from thinslice.text.tokenizer import BYTE_TO_CHARACTER

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LONGEST = 12
# How late the tokens come that a new one is made of, on average.
LEFT, RIGHT = 6000, 3000


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their ids, what a GGUF says of their types, and the merges that make them."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, object]:
        """The keys of a GGUF."""
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.types),
            "tokenizer.ggml.merges": list(self.merges),
        }


def make_vocabulary(num_tokens: int) -> Vocabulary:
    """A vocabulary of so many tokens, the same for the same number."""
    rng = random.Random(0)
    tokens = list(BYTE_TO_CHARACTER)
    seen, merges = set(tokens), list[str]()
    while len(tokens) < num_tokens - len(CONTROL):
        left, right = (
            tokens[int(rng.expovariate(1 / place)) % len(tokens)] for place in (LEFT, RIGHT)
        )
        if left + right not in seen and len(left + right) <= LONGEST:
            seen.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    types = (*[1] * len(tokens), *[3] * len(CONTROL))
    return Vocabulary((*tokens, *CONTROL), types, tuple(merges))


def write_vocabulary(folder: Path, num_tokens: int) -> None:
    """Write tokenizer.json, laid out as save_pretrained does."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_gguf_tokenizer(make_vocabulary(num_tokens).metadata)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=151_680)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_vocabulary(arguments.out, arguments.tokens)


if __name__ == "__main__":
    main()
