"""Read the rotary settings of a config.json, from each of the three places that may hold them.

They stand at the top level (``rope_theta``), in ``rope_scaling``, and since transformers 5 in
``rope_parameters``, which may hold one object for each type of layer. What the places say is
merged; a setting that two of them give different values is refused, for nobody could know which is
meant.
Source: RotaryEmbeddingConfigMixin in transformers 5.23, modeling_rope_utils.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from thinslice.errors import CheckpointError, plain
from thinslice.plan.header_fields import HeaderFields
from thinslice.plan.model_shape import RopeScaling

_TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_SUPPORTED = ("linear", "llama3", "yarn")
_ORIGINAL = "original_max_position_embeddings"
# What each type of scaling is computed from, beside the type itself and rope_theta.
_SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        _ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    # Ours alone: what a GGUF keeps as rope_freqs.weight, in a packed checkpoint made of it.
    "factors": ("freq_factors",),
}
# Known not to matter: the first says how the model was trained; the second cuts the frequencies
# into bands for a picture's axes, which have equal positions where there is only text.
_INERT = ("finetuned", "mrope_section")
# Turns within the original context; far less than one of them would be no finite wavelength.
_LEAST_BETA = 1e-9


@dataclass(frozen=True)
class RopeSettings:
    """What a config.json says of rotary embedding.

    Attributes:
        context: the most positions the model is made for: YaRN's original context times its factor
            where max_position_embeddings was left at less.
    """

    theta: float
    scaling: RopeScaling | None
    context: int


def read_rope(config: Mapping[str, Any], max_positions: int, head_dim: int) -> RopeSettings:
    """Read and merge the rotary settings.

    Errors: CheckpointError for settings that contradict each other, for a type that is not
    supported, and for numbers that are missing or out of range.
    """
    merged = _merge(config)
    fields = HeaderFields("config.json", merged)
    theta = fields.number("rope_theta", 10000.0)
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {merged['partial_rotary_factor']}; only rotary "
            "embedding of the whole head is supported"
        )
    _refuse_null_type(config, merged)
    rope_type = merged.get("rope_type", "default")
    if rope_type not in tuple(_SETTINGS_OF):
        raise CheckpointError(
            f"rotary scaling {rope_type!r:.40} is not supported; supported: {', '.join(_SUPPORTED)}"
        )
    if rope_type == "default":
        return RopeSettings(theta, None, max_positions)
    if rope_type == "factors":
        factors = factors_scaling(merged.get("freq_factors"), head_dim)
        return RopeSettings(theta, factors, max_positions)
    scaling = _scaling(config, fields, rope_type, max_positions)
    check_yarn_theta(scaling, theta)
    return RopeSettings(theta, scaling, scaled_context(scaling, max_positions))


def unread_settings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Rotary settings that the config's type of scaling does not use, by name.

    Errors: CheckpointError as ``read_rope``.
    """
    merged = _merge(config)
    used = _SETTINGS_OF.get(str(merged.get("rope_type", "default")), ())
    known = ("rope_type", *_TOP_LEVEL, *_INERT, *used)
    return tuple(key for key in merged if key not in known)


def scaled_context(scaling: RopeScaling | None, max_positions: int) -> int:
    """The context with YaRN, whose recipe leaves max_position_embeddings at the original one.

    Source: Qwen's model cards; vLLM takes the original context times the factor as well.
    """
    if scaling is None or scaling.rope_type != "yarn":
        return max_positions
    assert scaling.original_max_position_embeddings is not None
    return max(max_positions, int(scaling.original_max_position_embeddings * scaling.factor))


def factors_scaling(factors: Any, head_dim: int) -> RopeScaling:
    """Rotary scaling by explicit divisors, one for each frequency.

    Errors: CheckpointError for anything but so many positive numbers.
    """
    is_list = isinstance(factors, list | tuple)
    if not is_list or len(factors) != head_dim // 2 or not all(map(_is_factor, factors)):
        found = f"{len(factors)} factors" if is_list else f"{factors!r:.40}"
        raise CheckpointError(
            f"rotary scaling by factors has {found}; expected {head_dim // 2} numbers above 0"
        )
    return RopeScaling(rope_type="factors", freq_factors=tuple(map(float, factors)))


def check_yarn_theta(scaling: RopeScaling | None, theta: float) -> None:
    """Refuse a theta that YaRN cannot be computed with: its logarithm tells which dimensions turn.

    Errors: CheckpointError naming the setting.
    """
    if scaling is not None and scaling.rope_type == "yarn" and not theta > 1.0:
        raise CheckpointError(f"rotary scaling: yarn with rope_theta {theta}; expected more than 1")


def check_rope_scaling(scaling: RopeScaling) -> None:
    """Refuse factors that rotary scaling cannot be computed with.

    Errors: CheckpointError naming the setting.
    """
    original = scaling.original_max_position_embeddings
    if not 1.0 <= scaling.factor <= 1e6 or original is None or not 0 < original <= 1 << 27:
        raise CheckpointError(
            f"rotary scaling: factor {scaling.factor} with "
            f"original_max_position_embeddings {original}"
        )
    if not 0.0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise CheckpointError(
            f"rotary scaling: low_freq_factor {scaling.low_freq_factor} with "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    if not _LEAST_BETA <= scaling.beta_slow <= scaling.beta_fast:
        raise CheckpointError(
            f"rotary scaling: beta_slow {scaling.beta_slow} with beta_fast {scaling.beta_fast}"
        )
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        value = getattr(scaling, name)
        if value is not None and value < 0.0:
            raise CheckpointError(f"rotary scaling: {name} is {value}; expected at least 0")


def _scaling(
    config: Mapping[str, Any], fields: HeaderFields, rope_type: str, max_positions: int
) -> RopeScaling:
    original = fields.integer(_ORIGINAL, max_positions)
    if rope_type == "yarn" and "factor" not in fields.values and _has_null_factor(config):
        factor = max_positions / max(original, 1)  # as transformers has it
    else:
        factor = fields.number("factor")
    more: dict[str, Any] = {}
    if rope_type == "llama3":
        more = {key: fields.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if rope_type == "yarn":
        factors = ("attention_factor", "mscale", "mscale_all_dim")
        more = {key: fields.optional_number(key) for key in factors}
        more["beta_fast"] = fields.number("beta_fast", 32.0)
        more["beta_slow"] = fields.number("beta_slow", 1.0)
        more["truncate"] = fields.flag("truncate") if "truncate" in fields.values else True
    scaling = RopeScaling(rope_type, factor, original, **more)
    check_rope_scaling(scaling)
    return scaling


def _merge(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every rotary setting that some place gives a value."""
    merged: dict[str, Any] = {}
    found_in: dict[str, str] = {}
    for place, settings in _places(config):
        for name, value in settings.items():
            key = "rope_type" if name == "type" else name
            if value is None and key != "truncate":  # where null means no
                continue
            if key in merged and merged[key] != value:
                raise CheckpointError(
                    f"config.json: {plain(key, 60)} is {merged[key]!r:.40} in {found_in[key]} and "
                    f"{value!r:.40} in {place}; make them agree, or keep one of them"
                )
            merged[key], found_in[key] = value, place
    return merged


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "the top level", {key: config[key] for key in _TOP_LEVEL if key in config}
    for name in ("rope_scaling", "rope_parameters"):
        settings = config.get(name)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise CheckpointError(f"config.json: {name} is not an object")
        yield name, {key: settings[key] for key in settings if not key.endswith("_attention")}
        for layer_type in settings:
            if layer_type.endswith("_attention"):
                inner, place = settings[layer_type], f"{name}.{plain(layer_type, 40)}"
                if not isinstance(inner, dict):
                    raise CheckpointError(f"config.json: {place} is not an object")
                yield place, inner


def _refuse_null_type(config: Mapping[str, Any], merged: Mapping[str, Any]) -> None:
    """Refuse a type of null beside what a scaling is computed from: nobody could know which."""
    names_none = any(
        settings.get(name, "") is None
        for _, settings in _places(config)
        for name in ("type", "rope_type")
    )
    beside = [key for key in merged if key not in (*_TOP_LEVEL, *_INERT)]
    if names_none and beside and "rope_type" not in merged:
        raise CheckpointError(
            f"config.json: the type of rotary scaling is null beside {beside[0]!r:.60}; name it"
        )


def _has_null_factor(config: Mapping[str, Any]) -> bool:
    return any("factor" in settings for _, settings in _places(config))


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0.0 < value < 1e6
