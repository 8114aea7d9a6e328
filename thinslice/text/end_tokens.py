"""Tokens that end a generation, known by their text.

A GGUF names one end of sequence, and few files name the ends of a turn beside it; llama.cpp finds
them by their text.

Source: llama.cpp at 00ad355e, src/llama-vocab.cpp, llama_vocab::impl::load (special_eog_ids).
"""

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

_END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
        *("<|tool_response>", "[e~["),
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek writes it with wide bars
    )
)
# Where code is filled in, what stands between files. A key of the file goes before the texts.
_FILL_TEXTS: Mapping[str, tuple[str, ...]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def end_texts(tokens: Collection[str]) -> frozenset[str]:
    """Return the tokens of a vocabulary that end a turn or a document.

    ``<|end|>`` ends only a part of a turn in a vocabulary that has other ends of turns, and
    ``</s>`` is a tag of HTML where ``<|tool_response>`` is a token.

    Args:
        tokens: with a fast ``in``.
    """
    ends = {text for text in _END_TEXTS if text in tokens}
    has_call = "<|call|>" in ends or "<|calls|>" in ends
    if has_call and ("<|return|>" in ends or "<|flush|>" in ends):
        ends.discard("<|end|>")
    if "<|tool_response>" in ends:
        ends.discard("</s>")
    return frozenset(ends)


def fill_end_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """The ids of a GGUF's tokens that end the filling-in of code.

    They stay text: only a completion ends there. An id that no token has is passed over.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    wanted = frozenset(chain.from_iterable(_FILL_TEXTS.values()))
    ids = {token: token_id for token_id, token in enumerate(tokens) if token in wanted}
    ends = set()
    for name, texts in _FILL_TEXTS.items():
        given = metadata.get(f"tokenizer.ggml.{name}_token_id")
        known = [ids[text] for text in texts if text in ids]
        if type(given) is int and 0 <= given < len(tokens):
            ends.add(given)
        elif known:
            ends.add(min(known))
    return frozenset(ends)
