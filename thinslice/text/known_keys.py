"""Every key that a tokenizer's files are known to hold, and what thinslice does about it.

A key is read, or refused where its value would change token ids, or named where it is not applied,
or known not to matter. A key in none of these lists is named to the user.

Sources: transformers 5.23, tokenization_utils_base.py and tokenization_utils_tokenizers.py, and
what transformers 4 wrote; tokenizers 0.23; llama.cpp at 00ad355e,
src/llama-arch.cpp and src/llama-vocab.cpp; gguf 0.19, constants.py.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from thinslice.errors import CheckpointError
from thinslice.plan.known_keys import is_neutral, key_set, not_applied_note, unknown_note
from thinslice.text.named_tokens import FLAGS, NAMES, is_model_token
from thinslice.units import KIB, MIB

# tokenizer_config.json: what tokenizer_files and named_tokens read. Further names that end in
# _token are read as special tokens.
CONFIG_READ = key_set(
    """
    add_bos_token added_tokens_decoder additional_special_tokens chat_template
    extra_special_tokens model_specific_special_tokens
    """
) | set(NAMES)
# The values at which a key changes nothing; null is always one, and any other value is refused.
CONFIG_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (False,),
    "split_special_tokens": (False,),
}
# What some class of transformers does and TokenizersBackend, which takes tokenizer.json as it is,
# does not; an end of a text added to a prompt would end it. Named where it is set.
CONFIG_NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "add_eos_token": (False,),
    "do_lower_case": (False,),
    "errors": ("replace",),
    "fix_mistral_regex": (False,),
    "keep_accents": (),
    "remove_space": (),
    "sp_model_kwargs": ({},),
    "strip_accents": (False,),
}
# Batches and lengths, other files, classes, decoding that only tokenizers without tokenizer.json
# or other than BPE have. add_prefix_space is held against tokenizer.json.
CONFIG_INERT = key_set(
    """
    _commit_hash add_prefix_space auto_map backend bos_token_id chat_control_tokens
    clean_up_tokenization_spaces cls_token_id device_map eos_token_id files_loaded from_slow
    init_inputs is_local legacy local_files_only mask_token_id max_len max_length merges_file
    model_input_names model_max_length name_or_path pad_to_multiple_of pad_token_id
    pad_token_type_id padding padding_side processor_class response_schema response_template
    return_tensors return_token_type_ids sep_token_id slow_tokenizer_class
    spaces_between_special_tokens special_tokens_map_file stride suffix_first tokenizer_class
    tokenizer_file transformers_version trim_offsets truncation truncation_side
    truncation_strategy unk_id unk_token_id use_default_system_prompt use_fast verbose vocab_file
    """
)

# An added token of tokenizer.json.
ADDED_TOKEN_READ = frozenset(("id", "content", *FLAGS))

# GGUF, without "tokenizer.": what tokenizer_files, gguf_tokenizer, end_tokens and
# shape_from_gguf read.
GGUF_READ = key_set(
    """
    chat_template chat_template.tool_use
    ggml.add_bos_token ggml.add_space_prefix ggml.bos_token_id ggml.eom_token_id
    ggml.eos_token_id ggml.eot_token_id ggml.fim_pad_token_id ggml.fim_rep_token_id
    ggml.fim_sep_token_id ggml.merges ggml.model ggml.pre ggml.scores ggml.token_type ggml.tokens
    """
)
# An end or a separator would end a prompt; the charsmap normalises text before SentencePiece.
GGUF_NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "ggml.add_eos_token": (False,),
    "ggml.add_sep_token": (False,),
    "ggml.precompiled_charsmap": ([],),
    "ggml.suppress_tokens": ([],),
}
# Tokens that nothing here asks for, further templates, and what llama.cpp reads for kinds of
# tokenizers that are refused: its BPE and SentencePiece remove no whitespace.
GGUF_INERT = key_set(
    """
    chat_templates ggml.cls_token_id ggml.fim_mid_token_id ggml.fim_pre_token_id
    ggml.fim_suf_token_id ggml.mask_token_id ggml.middle_token_id ggml.normalizer.lowercase
    ggml.normalizer.strip_accents ggml.padding_token_id ggml.prefix_token_id
    ggml.remove_extra_whitespaces ggml.seperator_token_id ggml.suffix_token_id
    ggml.token_type_count ggml.unknown_token_id huggingface.json rwkv.world
    """
)
_ADDED_TOKENS = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
# The first look at that list, which mostly has a few kB, and the most of it that is looked at.
_FIRST_WINDOW = 128 * KIB
_MAX_ADDED_BYTES = 8 * MIB
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"


def check_tokenizer_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer_config.json that asks for tokens that thinslice would not give.

    Errors: CheckpointError naming the key.
    """
    asked = settings.get("add_bos_token")
    if not isinstance(asked, bool | None):
        raise CheckpointError(f"{_CONFIG}: add_bos_token is {asked!r:.60}; expected true or false")
    for key, neutral in CONFIG_NEUTRAL.items():
        if not is_neutral(settings.get(key), neutral):
            raise CheckpointError(
                f"{_CONFIG}: {key} is {settings[key]!r:.60}, which changes tokens in a way that is "
                "not supported"
            )


def tokenizer_config_notes(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], backend: Tokenizer
) -> tuple[str, ...]:
    """A line for each way in which the two files say what is not done, or not known.

    Args:
        backend: as tokenizer.json has it.
    """
    notes = [
        unknown_note(source, _unknown_config(values))
        for source, values in ((_CONFIG, config), (_MAP, special_tokens_map))
    ]
    notes.append(not_applied_note(_CONFIG, {**config, **special_tokens_map}, CONFIG_NOT_APPLIED))
    asked = config.get("add_prefix_space")
    if isinstance(asked, bool) and asked != _adds_prefix_space(backend):
        notes.append(
            f"{_CONFIG} sets add_prefix_space to {str(asked).lower()}, and tokenizer.json does "
            "otherwise; tokenizer.json is followed"
        )
    return tuple(note for note in notes if note)


def tokenizer_json_notes(content: bytes) -> tuple[str, ...]:
    """A line naming flags of added tokens that are not known.

    Only that list is taken in: the vocabulary has far more. Time and peak extra memory are those
    of decoding at most twice as many bytes as the list has: a few MiB, and about 1 kB for each
    added token. A list of more than 8 MiB gives no line.

    Args:
        content: of a tokenizer.json that the library takes.
    """
    found = _ADDED_TOKENS.search(content)
    if found is None:
        return ()
    unknown = {key for token in _first_list(content, found.end()) for key in token}
    note = unknown_note("an added token of tokenizer.json", list(unknown - ADDED_TOKEN_READ))
    return (note,) if note else ()


def _first_list(content: bytes, start: int) -> list[dict[str, Any]]:
    """The list that begins there, none where it is too long; what follows is the vocabulary."""
    length = _FIRST_WINDOW
    while length <= _MAX_ADDED_BYTES:
        text = content[start : start + length].decode(errors="ignore")
        try:
            tokens, _ = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            length *= 2
            continue
        return [token for token in tokens if isinstance(token, dict)]
    return []


def gguf_tokenizer_notes(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """A line for what the tokenizer.* keys of a GGUF say that is not applied, or not known."""
    prefix = "tokenizer."
    known = GGUF_READ | GGUF_INERT | set(GGUF_NOT_APPLIED)
    unknown = [
        key
        for key in metadata
        if key.startswith(prefix)
        and key.removeprefix(prefix) not in known
        and not key.startswith("tokenizer.chat_template.")
    ]
    not_applied = {f"{prefix}{key}": neutral for key, neutral in GGUF_NOT_APPLIED.items()}
    notes = unknown_note("this GGUF", unknown), not_applied_note("this GGUF", metadata, not_applied)
    return tuple(note for note in notes if note)


def _unknown_config(values: Mapping[str, Any]) -> list[str]:
    known = CONFIG_READ | CONFIG_INERT | set(CONFIG_NEUTRAL) | set(CONFIG_NOT_APPLIED)
    return [
        key for key, value in values.items() if not (key in known or is_model_token(key, value))
    ]


def _adds_prefix_space(backend: Tokenizer) -> bool:
    parts = [backend.normalizer, backend.pre_tokenizer]
    return any(_step_adds_space(json.loads(one.__getstate__())) for one in parts if one is not None)


def _step_adds_space(step: Mapping[str, Any]) -> bool:
    inner: Iterable[Mapping[str, Any]] = step.get("normalizers") or step.get("pretokenizers") or ()
    return (
        step.get("add_prefix_space") is True
        or step.get("prepend_scheme", "never") != "never"
        or step["type"] == "Prepend"
        or any(map(_step_adds_space, inner))
    )
