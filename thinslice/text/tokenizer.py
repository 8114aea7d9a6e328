"""Tokenizer: text to token ids and back, with what the model's files say about special tokens.

Decoding joins the exact bytes of the tokens and reads them as UTF-8; bytes that are no character
become U+FFFD. It does not stream: that is incremental.py.
"""

import json
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import tokenizers

from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError, RequestError
from thinslice.forks import cached_property
from thinslice.plan.known_keys import named_keys
from thinslice.text.chat_template import ChatTemplate, control_markers
from thinslice.text.library_errors import named_library_errors
from thinslice.text.pieces import PieceEncoder
from thinslice.text.reasoning import CLOSE, OPEN
from thinslice.text.tokenizer_files import TokenizerFiles, read_tokenizer_files
from thinslice.text.tool_styles import TAGS

_SURROGATE = re.compile("[\ud800-\udfff]")

# Far above any template's.
_MAX_MARKERS = 256
# What SentencePiece's Llama tokenizers decode by; the last is left out where no space is added.
_SENTENCEPIECE = (
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)
# Text to whoever reads the completion, also where a file calls them special.
_TAGS = frozenset((OPEN, CLOSE, *TAGS))


def _alphabet() -> tuple[str, ...]:
    """The alphabet of byte-level BPE: every byte as one printable character.

    Printable Latin-1 stands for itself, the other 68 bytes follow from U+0100 on in order.
    Source: GPT-2's encoder.py (openai/gpt-2, bytes_to_unicode).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters: list[str] = []
    num_shifted = 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(0x100 + num_shifted))
            num_shifted += 1
    return tuple(characters)


BYTE_TO_CHARACTER = _alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


class Tokenizer:
    """Encodes and decodes for one model.

    Args:
        vocab_size: the model's, with the padding some checkpoints have after their last token.

    Attributes:
        special: what the files say about special tokens.
        special_token_ids: tokens that are no text, such as <|im_end|>.
        strips_leading_space: a decoding drops one space at its start (SentencePiece).
        notes: what its user should know of the files, one line each.

    Errors: CheckpointError for a way of decoding that is not supported.
    """

    def __init__(self, files: TokenizerFiles, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.special = files.special
        self._backend = files.backend
        self._templates = files.templates
        added = files.backend.get_added_tokens_decoder()
        self._added_text = {token_id: token.content for token_id, token in added.items()}
        self.special_token_ids = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special and token.content not in _TAGS
        )
        with named_library_errors(CheckpointError, "the tokenizer cannot be used"):
            self._encoder = PieceEncoder(files.backend)
        decoding = _decoding_of(files.backend)
        self._is_byte_level = decoding.is_byte_level
        self.strips_leading_space = decoding.strips_leading_space
        self.notes = (*files.notes, *self._marker_notes())

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template, compiled; None for a model without one.

        Errors: CheckpointError as ``ChatTemplate``.
        """
        if self._templates.default is None:
            return None
        if isinstance(self._templates.default, CheckpointError):
            raise self._templates.default
        return ChatTemplate(self._templates.default, self.special.named, self._templates.tool_use)

    def _marker_notes(self) -> tuple[str, ...]:
        """A line naming the chat template's control markers that would be split into text."""
        sources = (self._templates.default, self._templates.tool_use)
        found = [control_markers(one) for one in sources if isinstance(one, str)]
        markers = list(dict.fromkeys(chain.from_iterable(found)))[:_MAX_MARKERS]
        with named_library_errors(CheckpointError, "the tokenizer cannot be used"):
            split = [one for one in markers if len(self._encoder.encode(one, None)) != 1]
        if not split:
            return ()
        verb = "is no token" if len(split) == 1 else "are no tokens"
        return (
            f"the chat template writes {named_keys(split)}, which {verb} of this tokenizer: the "
            "model gets pieces of text instead",
        )

    def encode(self, text: str, *, add_special_tokens: bool, limit: int | None = None) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        The text is taken in piece by piece (pieces.py), in memory that does not grow with it.

        Args:
            add_special_tokens: begin with what the model expects before a plain prompt, if
                anything. A rendered chat template has it already.
            limit: of a text with more tokens than this, give the first ones only, at least one
                more than this.

        Errors: RequestError for half of a surrogate pair, for a token the model has no embedding
        for, and for a text that the tokenizer cannot take in.
        """
        half = _SURROGATE.search(text)
        if half is not None:
            raise RequestError(
                f"the text holds half of a surrogate pair, {half[0]!r}, at character "
                f"{half.start()}; it is not valid Unicode"
            )
        with named_library_errors(RequestError, "the tokenizer cannot take the text in"):
            ids = self._encoder.encode(text, limit)
        if add_special_tokens:
            ids = [*self.special.prompt_prefix_ids, *ids]
        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise RequestError(
                f"the text holds the token {self._backend.id_to_token(largest)!r} (id {largest}), "
                f"for which the model's vocabulary of {self.vocab_size} has no embedding"
            )
        return ids

    def stop_ids(self, stop: Sequence[str]) -> frozenset[int]:
        """The ids of those stop strings that are special tokens, which have no text to look for.

        Errors: RequestError for a stop string that holds such a token beside other text.
        """
        ids = {self._added_text[one]: one for one in self.special_token_ids}
        for text in stop:
            held = next((token for token in ids if token and token in text), None)
            if text not in ids and held is not None:
                raise RequestError(
                    f"the stop string {text!r:.80} can never come: {held!r} in it is a special "
                    f"token, which is no text; stop at its id instead, {ids[held]}"
                )
        return frozenset(ids[text] for text in stop if text in ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some tokens.

        Errors: RequestError for an id outside the vocabulary.
        """
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        parts = [self.token_bytes(one) for one in token_ids if one not in skipped]
        text = b"".join(parts).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, which may be part of a character; none for padding.

        Errors: RequestError for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the model's vocabulary of {self.vocab_size}"
            )
        added = self._added_text.get(token_id)
        if added is not None:
            return added.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        return byte_level_bytes(token) if self._is_byte_level else _sentencepiece_bytes(token)

    def shown_bytes(self, token_id: int) -> bytes:
        """The same as completions show it: special tokens are no text."""
        return b"" if token_id in self.special_token_ids else self.token_bytes(token_id)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint: from its GGUF metadata, or from its folder's tokenizer.json.

    Errors: CheckpointError if that is missing, damaged or of a kind that is not supported.
    """
    return Tokenizer(read_tokenizer_files(checkpoint), checkpoint.shape.vocab_size)


@dataclass(frozen=True)
class _Decoding:
    is_byte_level: bool
    strips_leading_space: bool


def _decoding_of(backend: tokenizers.Tokenizer) -> _Decoding:
    """How tokens become text: by GPT-2's byte alphabet, or as SentencePiece's Llama tokenizers."""
    decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _Decoding(is_byte_level=True, strips_leading_space=False)
    if len(steps) in (3, 4) and all(map(operator.eq, steps, _SENTENCEPIECE)):
        return _Decoding(is_byte_level=False, strips_leading_space=len(kinds) == 4)
    others = [one for one, known in zip(steps, _SENTENCEPIECE, strict=False) if one != known]
    known_kinds = [step["type"] for step in _SENTENCEPIECE]
    found = others[0] if kinds in (known_kinds[:3], known_kinds) else kinds
    raise CheckpointError(
        f"the tokenizer's decoder {found!r:.120} is not supported; supported: ByteLevel, and "
        "SentencePiece's Replace, ByteFallback, Fuse, Strip"
    )


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a token outside the alphabet stands for its text."""
    try:
        return bytes([CHARACTER_TO_BYTE[character] for character in token])
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()
