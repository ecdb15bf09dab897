"""Families: what a Hugging Face config.json says of a model, as fields of Config, and back.

Every setting is read, or known to change nothing here, or refused by name: none is silently ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from mlrl.models import layouts, rope
from mlrl.models.mlp import gelu, gelu_tanh
from mlrl.models.transformer import Config
from mlrl.types import Refused

Fields = dict[str, Any]  # fields of Config by name; those that are left out have Config's default

# Fields that no checkpoint holds: of heads that are learned here, and of the arithmetic.
OURS = ("value_head", "critic_layers", "dtype", "param_dtype")

_ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": gelu_tanh, "gelu_new": gelu_tanh, "gelu": gelu}

# Settings that change no logit: of training elsewhere, of other heads, of how files and results are returned.
# Dropout too: mlrl trains without it.
_NO_MATTER = frozenset("""
    architectures model_type
    _attn_implementation _attn_implementation_autoset _name_or_path attention_dropout attn_pdrop begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward dtype embd_pdrop eos_token_id id2label initializer_range
    label2id max_position_embeddings n_ctx n_positions output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict router_aux_loss_coef
    router_jitter_noise summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    task_specific_params torch_dtype transformers_version unk_token_id use_cache
""".split())  # fmt: skip


class Settings:
    """The settings of a config.json, each marked as it is read. Null is as good as absent; `known` is read."""

    def __init__(self, settings: Mapping[str, Any], source: str, known: Sequence[str] | frozenset[str] = ()):
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._null = {name for name, value in settings.items() if value is None}
        self._source = source
        self._read = set(known)

    def any(self, name: str, default: Any = None) -> Any:
        """The value, or the default; with none, a missing setting is refused."""
        self._read.add(name)
        if name not in self._settings and default is None:
            raise Refused(f"{self._source} has no {name}")
        return self._settings.get(name, default)

    def null(self, name: str) -> bool:
        """Whether the setting is there, and null."""
        return name in self._null

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.any(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.refused(name, "a whole number")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.any(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "true or false")
        return value

    def fixed(self, **values: Any) -> None:
        """Refuses settings that are there with another value than the one that mlrl computes."""
        for name, value in values.items():
            if self.any(name, value) != value:
                raise self.refused(name, repr(value))

    def refused(self, name: str, wanted: str) -> Refused:
        return Refused(f"{self._source} sets {name} to {self._settings.get(name)!r}; mlrl knows {wanted}")

    def inner(self, name: str) -> Settings:
        """The settings inside of a setting; none if it is absent."""
        value = self.any(name, {})
        if not isinstance(value, dict):
            raise self.refused(name, "a group of settings")
        return Settings(value, f"{name} in {self._source}")

    def has(self, name: str) -> bool:
        return name in self._settings

    def all_read(self) -> None:
        """Refuses the first setting that nothing has read."""
        for name, value in self._settings.items():
            if name not in self._read:
                raise Refused(f"{self._source} sets {name} to {value!r}, which mlrl does not know")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    name          its model_type
    architecture  the class in transformers
    read          settings -> fields of Config
    write         Config -> settings; a Config of another family is not read back as it was
    layout        Config -> the tensors of its checkpoint
    prefix        of the names of tensors, which checkpoints without an output head leave out
    buffers       ends of the names of tensors that old checkpoints hold besides, and that are no parameters
    """

    name: str
    architecture: str
    read: Callable[[Settings], Fields]
    write: Callable[[Config], dict[str, Any]]
    layout: Callable[[Config], list[layouts.Tensor]] = layouts.decoder
    prefix: str = "model."
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)


def family_of(settings: Mapping[str, Any], source: str) -> tuple[Family, Fields]:
    """The family of a config.json, and the fields of Config that it sets. Raises Refused, naming what is unknown."""
    name, architectures = settings.get("model_type"), settings.get("architectures") or []
    family = next((family for family in FAMILIES if family.name == name), None)
    if family is None:
        raise Refused(f"{source} is of model_type {name!r}, which mlrl does not have: it has {known_names()}")
    if architectures and architectures != [family.architecture]:
        raise Refused(f"{source} is of the architecture {', '.join(map(str, architectures))}: mlrl has {known_names()}")
    reader = Settings(settings, source, _NO_MATTER)
    fields = family.read(reader)
    reader.all_read()
    return family, fields


def shape_of(config: Config) -> Config:
    """The config as a checkpoint determines it: without what is OURS, and with the shortest tuple of windows."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config) if field.name in OURS}
    windows = [config.windows[i % len(config.windows)] for i in range(config.layers)]
    return dataclasses.replace(config, windows=_cycle(windows), **defaults)


def settings_of(config: Config) -> tuple[Family, dict[str, Any]]:
    """The family that has this shape, and its config.json. Raises Refused where there is none."""
    shape, close = shape_of(config), []
    for family in FAMILIES:
        settings = {"architectures": [family.architecture], "model_type": family.name} | family.write(shape)
        try:
            back = Config(**family_of(settings, family.architecture)[1])
        except Refused:
            continue
        if back == shape:
            return family, settings
        close.append((differing(back, shape), family.architecture))
    fields, architecture = min(close, key=lambda pair: len(pair[0]), default=(["activation"], known_names()))
    raise Refused(f"no architecture that mlrl exports has this shape: {architecture} differs in Config."
                  f"{', Config.'.join(fields)}")  # fmt: skip


def known_names() -> str:
    """The architectures that are imported and exported."""
    return ", ".join(family.architecture for family in FAMILIES)


def differing(one: Config, other: Config) -> list[str]:
    """Names of the fields in which two configs differ."""
    return [f.name for f in dataclasses.fields(Config) if getattr(one, f.name) != getattr(other, f.name)]


def _sizes(s: Settings, *, head_dim: int = 0, kv_heads: int = 0, tied: bool = False) -> Fields:
    """The sizes and rotary positions that Llama's descendants share; with the family's defaults."""
    width, heads = s.whole("hidden_size"), s.whole("num_attention_heads")
    return {
        "vocabulary_size": s.whole("vocab_size"), "width": width, "layers": s.whole("num_hidden_layers"),
        "heads": heads, "kv_heads": s.whole("num_key_value_heads", kv_heads or heads),
        "head_width": s.whole("head_dim", head_dim or width // heads), "mlp_width": s.whole("intermediate_size"),
        "norm_eps": s.number("rms_norm_eps", 1e-6), "tied_head": s.flag("tie_word_embeddings", tied),
        "activation": _activation(s, "hidden_act", "silu"),
    }  # fmt: skip


def _sizes_back(c: Config) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary_size, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_width,
        "intermediate_size": c.mlp_width, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied_head,
        "hidden_act": _activation_name(c),
    }  # fmt: skip


def _activation(s: Settings, name: str, default: str) -> Callable:
    found = s.any(name, default)
    if found not in _ACTIVATIONS:
        raise s.refused(name, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[found]


def _activation_name(c: Config) -> str:
    return next((name for name, function in _ACTIVATIONS.items() if function == c.activation), "unknown")


def _rope(s: Settings, *, theta: float = 10_000.0) -> Fields:
    """rope_theta and rope_scaling, as older files have them, or rope_parameters, as newer ones do."""
    positions = s.any("max_position_embeddings", ())
    inner = s.inner("rope_parameters") if s.has("rope_parameters") else s.inner("rope_scaling")
    base = s.number("rope_theta", theta)
    return {"rope_theta": inner.number("rope_theta", base), "rope_scaling": _scaling(inner, positions)}


def _scaling(s: Settings, positions: Any) -> rope.Scaling:
    """The scaling that a group of settings describes; `positions` is max_position_embeddings."""
    kind, older = s.any("rope_type", ""), s.any("type", "")
    kind = kind or older or "default"
    s.fixed(partial_rotary_factor=1.0)
    s.any("rope_theta", ())
    if kind not in _SCALINGS:
        raise Refused(f"a rope_scaling of type {kind!r} is not known to mlrl: it has {', '.join(_SCALINGS)}")
    scaling = _SCALINGS[kind](s, positions)
    s.all_read()
    return scaling


def _unscaled(s: Settings, positions: Any) -> rope.Scaling:
    del positions
    s.any("factor", ())  # says nothing without a type
    return rope.unscaled


def _linear(s: Settings, positions: Any) -> rope.Scaling:
    del positions
    return rope.Linear(s.number("factor"))


def _llama3(s: Settings, positions: Any) -> rope.Scaling:
    original = s.whole("original_max_position_embeddings", positions or None)
    return rope.Llama3(s.number("factor"), s.number("low_freq_factor"), s.number("high_freq_factor"), original)


def _yarn(s: Settings, positions: Any) -> rope.Scaling:
    original = s.whole("original_max_position_embeddings", positions or None)
    factor = s.number("factor")
    scale = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    magnitude = scale(1.0)
    if s.has("mscale") and s.has("mscale_all_dim"):
        magnitude = scale(s.number("mscale")) / scale(s.number("mscale_all_dim"))
    return rope.Yarn(factor, original, s.number("attention_factor", magnitude), s.number("beta_fast", 32.0),
                     s.number("beta_slow", 1.0), s.flag("truncate", True))  # fmt: skip


_SCALINGS = {"default": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _scaling_back(scaling: rope.Scaling) -> dict[str, Any]:
    """The group of settings of a scaling; {} for none."""
    match scaling:
        case rope.Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case rope.Llama3(factor, low, high, original):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": original}  # fmt: skip
        case rope.Yarn(factor, original, magnitude, fast, slow, whole):
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                    "attention_factor": magnitude, "beta_fast": fast, "beta_slow": slow, "truncate": whole}  # fmt: skip
    return {}


def _rope_back(c: Config) -> dict[str, Any]:
    scaling = _scaling_back(c.rope_scaling)
    return {"rope_theta": c.rope_theta} | ({"rope_scaling": scaling} if scaling else {})


def _cycle(values: Sequence[int]) -> tuple[int, ...]:
    """The shortest tuple that repeats to `values`: (4, 0, 4) is (4, 0)."""
    n = next(n for n in range(1, len(values) + 1) if all(values[i] == values[i % n] for i in range(len(values))))
    return tuple(values[:n])


def _windows(s: Settings, layers: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows by layer_types, or by a function of the layer's index where these are absent."""
    kinds = s.any("layer_types", ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)])
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise s.refused("layer_types", f"full_attention and sliding_attention, {layers} in number")
    return _cycle([window if kind == "sliding_attention" else 0 for kind in kinds])


def _windows_back(c: Config) -> dict[str, Any]:
    windows = [c.windows[i % len(c.windows)] for i in range(c.layers)]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": kinds}


def _read_llama(s: Settings) -> Fields:
    biased = s.flag("attention_bias", False)
    return _sizes(s) | _rope(s) | {"qkv_bias": biased, "out_bias": biased, "mlp_bias": s.flag("mlp_bias", False)}


def _write_llama(c: Config) -> dict[str, Any]:
    return _sizes_back(c) | _rope_back(c) | {"attention_bias": c.out_bias, "mlp_bias": c.mlp_bias}


def _qwen_windows(s: Settings, layers: int) -> Fields:
    used, first = s.flag("use_sliding_window", False), s.whole("max_window_layers", 28)
    window = s.whole("sliding_window", 4096)
    return {"windows": _windows(s, layers, window if used else 0, lambda i: used and i >= first)}


def _read_qwen2(s: Settings) -> Fields:
    sizes = _sizes(s)
    return sizes | _rope(s) | _qwen_windows(s, sizes["layers"]) | {"qkv_bias": True}


def _write_qwen2(c: Config) -> dict[str, Any]:
    return _sizes_back(c) | _rope_back(c) | _windows_back(c) | {"use_sliding_window": any(c.windows)}


FAMILIES = (
    Family("llama", "LlamaForCausalLM", _read_llama, _write_llama),
    Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
)
