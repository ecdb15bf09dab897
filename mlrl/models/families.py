"""Families: what a Hugging Face config.json says of a model, as fields of Config, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from mlrl.models import layouts, rope
from mlrl.models.mlp import gelu, gelu_tanh
from mlrl.models.norms import LayerNorm, OffsetRMSNorm
from mlrl.models.rope_settings import scaling_back, scaling_of
from mlrl.models.settings import NO_MATTER, Settings
from mlrl.models.transformer import Config
from mlrl.types import Refused

Fields = dict[str, Any]  # fields of Config by name; those that are left out have Config's default

# Fields that no checkpoint holds: of what is learned here beside its weights, and of the arithmetic.
OURS = ("value_head", "critic_layers", "lora_rank", "lora_alpha", "lora_kernels", "scan_layers", "attention",
        "remat", "dtype", "param_dtype")  # fmt: skip

_MOST_LAYERS = 9_999  # more is a mistake, and would be listed one by one
_ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": gelu_tanh, "gelu_new": gelu_tanh, "gelu": gelu}

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


def family_of(settings: Mapping[str, Any], source: str, *, judges: bool = False) -> tuple[Family, Fields]:
    """The family of a config.json, and the fields of Config that it sets. Raises Refused, naming what is unknown.

    Args:
      judges: it is of a sequence classifier instead, whose score is the value head; it has no output head.
    """
    name, architectures = settings.get("model_type"), settings.get("architectures") or []
    family = next((family for family in FAMILIES if family.name == name), None)
    if family is None:
        raise Refused(f"{source} is of model_type {name!r}, which mlrl does not have: it has {known_names()}")
    family = _judging(family) if judges else family
    if architectures and architectures != [family.architecture]:
        listed = architectures if isinstance(architectures, list) else [architectures]
        known = family.architecture if judges else known_names()
        raise Refused(f"{source} is of the architecture {', '.join(map(str, listed))}: mlrl has {known}"
                      + " for reward models" * judges)  # fmt: skip
    reader = Settings(settings, source, NO_MATTER)
    fields = family.read(reader)
    reader.all_read()
    return family, fields | ({"value_head": True, "tied_head": True} if judges else {})


def _judging(family: Family) -> Family:
    """The sequence classifiers of a family of language models."""
    stem = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    layout = lambda c: layouts.judging(family.layout(c), c.width)  # noqa: E731
    return dataclasses.replace(family, architecture=f"{stem}ForSequenceClassification", layout=layout)


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


def _sizes(s: Settings, *, head_dim: int = 0, kv_heads: int = 0, tied: bool = False,
           norm_eps: float = 1e-6) -> Fields:  # fmt: skip
    """The sizes and rotary positions that Llama's descendants share; with the family's defaults."""
    width, heads = s.whole("hidden_size", least=1), s.whole("num_attention_heads", least=1)
    return {
        "vocabulary_size": s.whole("vocab_size", least=1), "width": width,
        "layers": s.whole("num_hidden_layers", least=1, most=_MOST_LAYERS), "heads": heads,
        "kv_heads": s.whole("num_key_value_heads", kv_heads or heads, least=1),
        "head_width": s.whole("head_dim", head_dim or width // heads, least=1),
        "mlp_width": s.whole("intermediate_size", least=1),
        "norm_eps": s.number("rms_norm_eps", norm_eps), "tied_head": s.flag("tie_word_embeddings", tied),
    }  # fmt: skip


def _sizes_back(c: Config) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary_size, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_width,
        "intermediate_size": c.mlp_width, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied_head,
        "hidden_act": _activation_name(c),
    }  # fmt: skip


def _activation(s: Settings, name: str, default: str) -> Callable:
    return _ACTIVATIONS[s.choice(name, _ACTIVATIONS, default)]


def _silu(s: Settings) -> Fields:
    """The activation, which is SiLU unless hidden_act says otherwise."""
    return {"activation": _activation(s, "hidden_act", "silu")}


def _activation_name(c: Config) -> str:
    return next((name for name, function in _ACTIVATIONS.items() if function == c.activation), "unknown")


def _rope(s: Settings, *, theta: float = 10_000.0) -> Fields:
    """rope_theta and rope_scaling, as older files have them, or rope_parameters, as newer ones do."""
    positions = s.any("max_position_embeddings", ())
    inner = s.inner("rope_parameters") if s.has("rope_parameters") else s.inner("rope_scaling")
    base = s.number("rope_theta", theta)
    return {"rope_theta": inner.number("rope_theta", base), "rope_scaling": scaling_of(inner, positions)}


def _rope_back(c: Config) -> dict[str, Any]:
    scaling = scaling_back(c.rope_scaling)
    return {"rope_theta": c.rope_theta} | ({"rope_scaling": scaling} if scaling else {})


def _cycle(values: Sequence[int]) -> tuple[int, ...]:
    """The shortest tuple that repeats to `values`: (4, 0, 4) is (4, 0)."""
    n = next(n for n in range(1, len(values) + 1) if all(values[i] == values[i % n] for i in range(len(values))))
    return tuple(values[:n])


def _windows(s: Settings, layers: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows by layer_types, or by a function of the layer's index where these are absent."""
    kinds = s.any("layer_types", ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)])
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise s.refused("layer_types", f"full_attention and sliding_attention, {layers} in number")
    return _cycle([window if kind == "sliding_attention" else 0 for kind in kinds])


def _windows_back(c: Config) -> dict[str, Any]:
    windows = [c.windows[i % len(c.windows)] for i in range(c.layers)]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": kinds}


def _read_llama(s: Settings) -> Fields:
    biased = s.flag("attention_bias", False)
    more = {"qkv_bias": biased, "out_bias": biased, "mlp_bias": s.flag("mlp_bias", False)}
    return _silu(s) | _sizes(s) | _rope(s) | more


def _write_llama(c: Config) -> dict[str, Any]:
    return _sizes_back(c) | _rope_back(c) | {"attention_bias": c.out_bias, "mlp_bias": c.mlp_bias}


def _qwen_windows(s: Settings, layers: int) -> Fields:
    used, first = s.flag("use_sliding_window", False), s.whole("max_window_layers", 28)
    window = s.whole("sliding_window", 4096)
    return {"windows": _windows(s, layers, window if used else 0, lambda i: used and i >= first)}


def _read_qwen2(s: Settings) -> Fields:
    sizes = _silu(s) | _sizes(s)
    return sizes | _rope(s) | _qwen_windows(s, sizes["layers"]) | {"qkv_bias": True}


def _write_qwen2(c: Config) -> dict[str, Any]:
    return _sizes_back(c) | _rope_back(c) | _windows_back(c) | {"use_sliding_window": any(c.windows)}


def _read_qwen3(s: Settings) -> Fields:
    sizes, biased = _silu(s) | _sizes(s, head_dim=128), s.flag("attention_bias", False)
    more = {"qk_norm": True, "qkv_bias": biased, "out_bias": biased}
    return sizes | _rope(s) | _qwen_windows(s, sizes["layers"]) | more


def _write_qwen3(c: Config) -> dict[str, Any]:
    return _write_qwen2(c) | {"attention_bias": c.out_bias}


def _read_mistral(s: Settings) -> Fields:
    window = 0 if s.null("sliding_window") else s.whole("sliding_window", 4096)
    return _silu(s) | _sizes(s, kv_heads=8) | _rope(s) | {"windows": (window,)}


def _write_mistral(c: Config) -> dict[str, Any]:
    return _sizes_back(c) | _rope_back(c) | {"sliding_window": c.windows[0] or None}


def _read_mixtral(s: Settings) -> Fields:
    window = s.whole("sliding_window", 0)
    experts = {"experts": s.whole("num_local_experts", 8), "experts_per_token": s.whole("num_experts_per_tok", 2)}
    sizes = _silu(s) | _sizes(s, kv_heads=8, norm_eps=1e-5) | _rope(s, theta=1e6)
    return sizes | experts | {"windows": (window,)}


def _write_mixtral(c: Config) -> dict[str, Any]:
    return _write_mistral(c) | {"num_local_experts": c.experts, "num_experts_per_tok": c.experts_per_token}


def _read_qwen3_moe(s: Settings) -> Fields:
    """Every layer has experts: those that mix in dense ones are refused."""
    s.fixed(decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False)
    s.any("sliding_window", ())
    s.any("max_window_layers", ())
    sizes, biased = _silu(s) | _sizes(s, kv_heads=4), s.flag("attention_bias", False)
    return sizes | _rope(s) | {
        "mlp_width": s.whole("moe_intermediate_size", 768), "qk_norm": True, "qkv_bias": biased, "out_bias": biased,
        "experts": s.whole("num_experts", s.whole("num_local_experts", 128)),
        "experts_per_token": s.whole("num_experts_per_tok", 8),
        "experts_renormalized": s.flag("norm_topk_prob", False),
    }  # fmt: skip


def _write_qwen3_moe(c: Config) -> dict[str, Any]:
    return _sizes_back(c) | _rope_back(c) | {
        "attention_bias": c.out_bias, "moe_intermediate_size": c.mlp_width, "num_experts": c.experts,
        "num_experts_per_tok": c.experts_per_token, "norm_topk_prob": c.experts_renormalized, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }  # fmt: skip


def _gemma(s: Settings, activation: str) -> Fields:
    """What the three Gemmas share. Gemma 1's files say gelu and mean its approximation by tanh."""
    s.fixed(use_bidirectional_attention=False)
    biased = s.flag("attention_bias", False)
    for name in {"hidden_act", "hidden_activation"} - {activation}:  # older files have both
        if s.any(name, "gelu_pytorch_tanh") not in ("gelu", "gelu_pytorch_tanh"):
            raise s.refused(name, "gelu_pytorch_tanh")
    shared = {"norm": OffsetRMSNorm, "qkv_bias": biased, "out_bias": biased,
              "embedding_scale": math.sqrt(s.whole("hidden_size"))}  # fmt: skip
    found = s.any(activation, "gelu_pytorch_tanh")
    shared["activation"] = gelu_tanh if found == "gelu" else _activation(s, activation, "gelu_pytorch_tanh")
    return _sizes(s, head_dim=256, tied=True) | shared


def _gemma_back(c: Config, activation: str) -> dict[str, Any]:
    settings = _sizes_back(c) | {"attention_bias": c.out_bias}
    settings[activation] = settings.pop("hidden_act")
    return settings


def _read_gemma(s: Settings) -> Fields:
    return _gemma(s, "hidden_act") | _rope(s)


def _write_gemma(c: Config) -> dict[str, Any]:
    return _gemma_back(c, "hidden_act") | _rope_back(c)


def _soft_capped(s: Settings, attention: float, logits: float) -> Fields:
    """Caps and the scale of the queries of Gemma 2 and 3; a cap that is null is none."""
    caps = {"attention_cap": ("attn_logit_softcapping", attention), "logits_cap": ("final_logit_softcapping", logits)}
    return {field: 0.0 if s.null(name) else s.number(name, default) for field, (name, default) in caps.items()} | {
        "scale_width": s.whole("query_pre_attn_scalar", 256), "post_norms": True}  # fmt: skip


def _soft_capped_back(c: Config) -> dict[str, Any]:
    return {"attn_logit_softcapping": c.attention_cap or None, "final_logit_softcapping": c.logits_cap or None,
            "query_pre_attn_scalar": c.scale_width}  # fmt: skip


def _read_gemma2(s: Settings) -> Fields:
    shared = _gemma(s, "hidden_activation")
    windows = _windows(s, shared["layers"], s.whole("sliding_window", 4096), lambda i: i % 2 == 0)
    return shared | _rope(s) | _soft_capped(s, 50.0, 30.0) | {"windows": windows}


def _write_gemma2(c: Config) -> dict[str, Any]:
    return _gemma_back(c, "hidden_activation") | _rope_back(c) | _soft_capped_back(c) | _windows_back(c)


def _read_gemma3(s: Settings) -> Fields:
    shared = _gemma(s, "hidden_activation")
    every = s.whole("sliding_window_pattern", s.whole("_sliding_window_pattern", 6, least=1), least=1)
    windows = _windows(s, shared["layers"], s.whole("sliding_window", 4096), lambda i: (i + 1) % every > 0)
    more = {"windows": windows, "qk_norm": True}
    return shared | _gemma3_rope(s) | _soft_capped(s, 0.0, 0.0) | more


def _gemma3_rope(s: Settings) -> Fields:
    """One base for layers that see all, with the scaling, and one for layers with a window."""
    local = s.number("rope_local_base_freq", 10_000.0)
    if not s.has("rope_parameters"):
        return _rope(s, theta=1e6) | {"window_rope_theta": local}
    inner = s.inner("rope_parameters")
    near, far = inner.inner("sliding_attention"), inner.inner("full_attention")
    inner.all_read()
    if scaling_of(near, ()) != rope.unscaled:
        raise s.refused("rope_parameters", "a scaling of full_attention only")
    base, positions = s.number("rope_theta", 1e6), s.any("max_position_embeddings", ())
    return {"rope_theta": far.number("rope_theta", base), "rope_scaling": scaling_of(far, positions),
            "window_rope_theta": near.number("rope_theta", local)}  # fmt: skip


def _write_gemma3(c: Config) -> dict[str, Any]:
    return _write_gemma2(c) | {"rope_local_base_freq": c.window_rope_theta}


def _read_gpt2(s: Settings) -> Fields:
    s.fixed(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, heads = s.whole("n_embd", 768, least=1), s.whole("n_head", 12, least=1)
    return {
        "vocabulary_size": s.whole("vocab_size", 50257, least=1), "width": width,
        "layers": s.whole("n_layer", 12, least=1, most=_MOST_LAYERS), "heads": heads, "kv_heads": heads,
        "head_width": width // heads, "mlp_width": s.whole("n_inner", 4 * width),
        "learned_positions": s.whole("n_positions", 1024), "norm": LayerNorm,
        "norm_eps": s.number("layer_norm_epsilon", 1e-5), "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "gated_mlp": False, "activation": _activation(s, "activation_function", "gelu_new"),
        "tied_head": s.flag("tie_word_embeddings", True),
    }  # fmt: skip


def _write_gpt2(c: Config) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary_size, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads,
        "n_inner": c.mlp_width, "n_positions": c.learned_positions, "layer_norm_epsilon": c.norm_eps,
        "activation_function": _activation_name(c).replace("gelu_pytorch_tanh", "gelu_new"),
        "tie_word_embeddings": c.tied_head,
    }  # fmt: skip


# The first that has a shape exports it: a family comes before those that can say the same and more.
FAMILIES = (
    Family("llama", "LlamaForCausalLM", _read_llama, _write_llama),
    Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
    Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral,
           functools.partial(layouts.decoder, experts=layouts.mixtral_experts)),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
    Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma),
    Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3),
    Family("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, layouts.gpt2, "transformer.",
           (".attn.bias", ".attn.masked_bias")),
)
