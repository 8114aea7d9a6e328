"""Every key that a model's files are known to hold, and what thinslice does about it.

A key is read, or refused where its value would change the model's numbers, or known not to matter.
A key in none of these lists is named to the user, who may know what it means.

Sources: the configuration classes of transformers 5.23 for the supported families, and
GenerationConfig; llama.cpp's src/llama-arch.cpp, src/llama-model.cpp and src/models for GGUF; the
files of the models themselves.
"""

from collections.abc import Mapping
from typing import Any

from thinslice.errors import CheckpointError, plain
from thinslice.plan.header_fields import HeaderFields

_NUM_NAMED = 8


def key_set(names: str) -> frozenset[str]:
    """The names, written with blanks between them."""
    return frozenset(names.split())


# config.json: what shape_from_config, read_rope, read_architecture and Packing read.
CONFIG_READ = key_set(
    """
    architectures attention_bias bos_token_id dtype eos_token_id head_dim hidden_act hidden_size
    intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias model_type
    num_attention_heads num_hidden_layers num_key_value_heads num_nextn_predict_layers
    original_max_position_embeddings partial_rotary_factor quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype
    use_sliding_window vocab_size
    """
)
# The values at which a key changes nothing; null is always one, and any other value is refused.
# Of a model with a text trunk, read_architecture takes text_config apart.
CONFIG_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "add_full_attention_sink_bias": (False,),
    "add_swa_attention_sink_bias": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_value_scale": (1,),
    "attn_logit_softcapping": (0,),
    "attn_temperature_tuning": (False, 0),
    "clip_qkv": (0,),
    "compression_config": ({},),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "hybrid_layer_pattern": ([],),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_kv_shared_layers": (0,),
    "num_local_experts": (0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "q_lora_rank": (),
    "quantization": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window_pattern": (),
    "text_config": ({},),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "v_head_dim": (),
}
# Names, training, classification, how other programs run the model, and the parts of a model for
# pictures or sound beside its trunk.
_CONFIG_OTHER = key_set(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path attention_dropout attn_implementation auto_map chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size embd_pdrop finetuning_task
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder is_llama_config
    label2id max_sequence_length model_max_length mtp_loss_step_weights name_or_path num_labels
    num_speculative_steps output_attentions output_hidden_states pad_token_id prefix pretraining_tp
    problem_type resid_pdrop return_dict sep_token_id task_specific_params tf_legacy_loss
    tie_last_hidden_states tokenizer_class torchscript transformers.js_config transformers_version
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict
    """
)
_CONFIG_OTHER_PARTS = key_set(
    """
    add_input_local_transformer add_speech_sosp_eosp audio_channels audio_config delay_pattern
    empty_loss_weight group_size image_token_id input_full_attention input_local_dim
    input_local_layers local_attn_dropout local_attn_heads local_dim local_ffn_dim
    local_hidden_dropout local_layers local_rotary_base mlp_layers n_rvq no_speech_loss no_text_loss
    speech_vocab_size speech_zeroemb_idx video_token_id vision_config vision_end_token_id
    vision_start_token_id vision_token_id
    """
)

# generation_config.json: end-of-sequence ids, and what advised_sampling reads.
GENERATION_READ = key_set("do_sample eos_token_id min_p repetition_penalty temperature top_k top_p")
_GENERATION_SAMPLING = key_set(
    """
    max_length max_new_tokens max_time num_return_sequences
    """
)
# Penalties and the early end of beams mean nothing without them, and num_beams is named.
_GENERATION_OTHER = key_set(
    """
    _from_model_config assistant_confidence_threshold assistant_early_exit
    assistant_ensemble_weight assistant_lookbehind bos_token_id cache_config cache_implementation
    chat_format compile_config continuous_batching_config decoder_start_token_id disable_compile
    diversity_penalty early_stopping is_assistant length_penalty low_memory max_cache_len
    max_matching_ngram_size max_window_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups output_attentions
    output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate
    speculation_type target_lookbehind transformers_version trust_remote_code use_cache use_mtp
    """
)
GENERATION_INERT = _GENERATION_SAMPLING | _GENERATION_OTHER
# What would change an answer and no option of thinslice can ask for; named where it is set.
GENERATION_NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
# Sampling settings that older files keep in config.json are not read there.
_GENERATION = GENERATION_READ | GENERATION_INERT | set(GENERATION_NOT_APPLIED)
CONFIG_INERT = (_CONFIG_OTHER | _CONFIG_OTHER_PARTS | _GENERATION) - CONFIG_READ

# GGUF, without the architecture's prefix: what shape_from_gguf reads.
GGUF_READ = key_set(
    """
    attention.head_count attention.head_count_kv attention.key_length
    attention.layer_norm_rms_epsilon attention.scale attention.sliding_window
    attention.value_length block_count context_length embedding_length expert_count
    feed_forward_length rope.dimension_count
    rope.freq_base rope.scale_linear rope.scaling.attn_factor rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_beta_fast
    rope.scaling.yarn_beta_slow rope.scaling.yarn_log_multiplier
    """
)
GGUF_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.sliding_window_pattern": (0, 1),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "full_attention_interval": (0, 1),
    "hidden_activation": ("silu", "swish"),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "use_parallel_residual": (False,),
}
# Of experts only the count decides, which is read; the layout of rows is always llama.cpp's.
GGUF_INERT = key_set(
    """
    attention.group_norm_epsilon attention.group_norm_groups attention.layer_norm_epsilon
    expert_feed_forward_length expert_group_count expert_group_used_count
    expert_shared_count expert_used_count expert_gating_func
    expert_weights_norm expert_weights_scale leading_dense_block_count
    pooling_type rope.dimension_sections rope.scaling.finetuned tensor_data_layout vocab_size
    """
)
# Of how to sample, without "general.sampling.": what advised_sampling reads.
GGUF_SAMPLING_READ = key_set("min_p penalty_repeat temp top_k top_p")
# What would change an answer and no option of thinslice can ask for; named where it is set. The
# repetition penalty is of all tokens, which is a window of -1.
GGUF_SAMPLING_NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "penalty_last_n": (-1,),
    "sequence": ("",),
    "xtc_probability": (0,),
}
# Nothing without mirostat and xtc_probability.
GGUF_SAMPLING_INERT = key_set("mirostat_eta mirostat_tau xtc_threshold")
_GGUF_SAMPLING = "general.sampling."
# Of keys outside the architecture: descriptions, the parts of a file, statistics of a quantiser;
# tokenizer keys are text/known_keys.py's.
_GGUF_OTHER_PREFIXES = ("general.", "tokenizer.", "split.", "quantize.", "imatrix.", "training.")


def check_config_keys(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks for something that is not computed here.

    Errors: CheckpointError naming the key.
    """
    _check_neutral(HeaderFields("config.json", config), CONFIG_NEUTRAL)


def config_notes(
    config: Mapping[str, Any],
    unread_rope_settings: tuple[str, ...],
    generation_config: Mapping[str, Any],
) -> tuple[str, ...]:
    """One line for each file that holds keys that are not read and may matter."""
    known = CONFIG_READ | CONFIG_INERT | set(CONFIG_NEUTRAL)
    notes = [
        unknown_note("config.json", [key for key in config if key not in known]),
        unknown_note("config.json's rotary scaling", list(unread_rope_settings)),
        unknown_note(
            "generation_config.json",
            [key for key in generation_config if key not in _GENERATION],
        ),
        not_applied_note("generation_config.json", generation_config, GENERATION_NOT_APPLIED),
    ]
    return tuple(note for note in notes if note)


def check_gguf_keys(fields: HeaderFields) -> None:
    """Refuse a GGUF that asks for something that is not computed here.

    Args:
        fields: the architecture's keys.

    Errors: CheckpointError naming the key.
    """
    _check_neutral(fields, GGUF_NEUTRAL)


def gguf_notes(metadata: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    """Lines naming the keys of a GGUF that are not read, or not applied, and may matter."""
    of_architecture = GGUF_READ | GGUF_INERT | set(GGUF_NEUTRAL)
    of_sampling = GGUF_SAMPLING_READ | GGUF_SAMPLING_INERT | set(GGUF_SAMPLING_NOT_APPLIED)
    known = {f"{architecture}.{key}" for key in of_architecture}
    known |= {f"{_GGUF_SAMPLING}{key}" for key in of_sampling}
    unknown = [
        key
        for key in metadata
        if key not in known
        and (key.startswith(_GGUF_SAMPLING) or not key.startswith(_GGUF_OTHER_PREFIXES))
    ]
    not_applied = {f"{_GGUF_SAMPLING}{key}": one for key, one in GGUF_SAMPLING_NOT_APPLIED.items()}
    source = "this GGUF"
    notes = unknown_note(source, unknown), not_applied_note(source, metadata, not_applied)
    return tuple(note for note in notes if note)


def _check_neutral(fields: HeaderFields, neutral_of: Mapping[str, tuple[Any, ...]]) -> None:
    for key, neutral in neutral_of.items():
        value = fields.get(key)
        if not is_neutral(value, neutral):
            raise CheckpointError(
                f"{fields.source}: {key} is {value!r:.60}, which changes the model's numbers in a "
                "way that is not supported"
            )


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a key with this value changes nothing."""
    return value is None or value in neutral


def unknown_note(source: str, keys: list[str]) -> str:
    """A line naming keys that are not read and may matter; empty where there are none."""
    if not keys:
        return ""
    verb = "is" if len(keys) == 1 else "are"
    return f"{source} sets {named_keys(keys)}, which {verb} not known to thinslice and not read"


def not_applied_note(
    source: str, values: Mapping[str, Any], neutral_of: Mapping[str, tuple[Any, ...]]
) -> str:
    """A line naming those of some keys whose values would change something; empty for none."""
    keys = [key for key, neutral in neutral_of.items() if not is_neutral(values.get(key), neutral)]
    verb = "is" if len(keys) == 1 else "are"
    return f"{source} sets {named_keys(keys)}, which {verb} not applied" if keys else ""


def named_keys(keys: list[str]) -> str:
    """The first few keys, and how many more there are."""
    shown = ", ".join(plain(key, 60) for key in sorted(keys)[:_NUM_NAMED])
    rest = len(keys) - _NUM_NAMED
    return shown + (f" and {rest} more" if rest > 0 else "")
