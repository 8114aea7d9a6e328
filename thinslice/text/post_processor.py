"""What a tokenizer.json puts around a text, of which only what goes before it is done."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from thinslice.errors import CheckpointError
from thinslice.text.mergers import state_of
from thinslice.text.split_points import flat

_TEMPLATE, _INERT = "TemplateProcessing", "ByteLevel"  # the second only moves offsets


@dataclass(frozen=True)
class Around:
    """The special tokens around a text.

    Attributes:
        before: ids that a prompt begins with.
        after: names of tokens that would end a prompt, and are left out.
    """

    before: tuple[int, ...] = ()
    after: tuple[str, ...] = ()


def tokens_around(backend: Tokenizer, vocab_size: int) -> Around:
    """What the post-processor puts before a text and after it.

    Errors: CheckpointError for a post-processor of another kind, whose tokens are not known, and
    for a token before the text that is none of the model's.
    """
    steps = list(flat(state_of(backend.post_processor), "processors"))
    kinds = [step["type"] for step in steps if step["type"] != _INERT]
    if kinds not in ([], [_TEMPLATE]):
        raise CheckpointError(
            f"tokenizer.json: its post-processor, {', '.join(kinds):.80}, is not supported; "
            f"supported: {_INERT} and one {_TEMPLATE}"
        )
    templates = [step for step in steps if step["type"] == _TEMPLATE]
    return _around(templates[0], vocab_size) if templates else Around()


def _around(template: Mapping[str, Any], vocab_size: int) -> Around:
    pieces = template["single"]
    texts = [place for place, piece in enumerate(pieces) if "SpecialToken" not in piece]
    if len(texts) > 1:
        raise CheckpointError("tokenizer.json: its post-processor takes a text more than once")
    middle = texts[0] if texts else len(pieces)
    before = [piece["SpecialToken"]["id"] for piece in pieces[:middle]]
    after = [piece["SpecialToken"]["id"] for piece in pieces[middle + 1 :]]
    known = template["special_tokens"]
    if not all(name in known for name in before):
        raise CheckpointError("tokenizer.json: its post-processor names an unknown token")
    ids = tuple(one for name in before for one in known[name]["ids"])
    if max(ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json: its post-processor begins a text with token {max(ids)}, and the "
            f"model's vocabulary has {vocab_size}"
        )
    return Around(ids, tuple(after))
