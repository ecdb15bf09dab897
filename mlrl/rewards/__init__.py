"""Rewards: liftings of plain functions, combinators, shipped rewards and adapters, imported when first used.

Lazily, because worker processes import `mlrl.rewards.shipped` and must not pay for (or hold) JAX.
"""

import importlib

_PUBLIC = {
    "mlrl.rewards.lifting": ("in_graph", "lift", "stateful", "with_models"),
    "mlrl.rewards.completions": ("per_completion",),
    "mlrl.rewards.combinators": (
        "center", "chain", "clip", "gate", "potential_shaping", "scale", "weighted_sum",
    ),
    "mlrl.rewards.shipped": (
        "exact", "format_tags", "gsm8k_lenient", "gsm8k_score", "gsm8k_strict", "knights_and_knaves_score",
        "length", "numeric", "reasoning_gym_score", "regular_expression", "symbolic",
    ),
    "mlrl.rewards.graph": (
        "arithmetic", "countdown", "final_answer", "from_environment", "length_tokens", "overlong", "random",
        "token_count", "truncated_penalty",
    ),
    "mlrl.rewards.lengths": ("laser", "laser_d", "laser_de", "self_rewarded_efficiency", "truncation"),
    "mlrl.rewards.shaped": ("centred_linear", "clip_to_deviation", "minmax", "par", "sigmoid", "standardize"),
    "mlrl.rewards.programs": ("input_found", "output_found", "tests_passed"),
    "mlrl.rewards.adapters": ("from_openrlhf", "from_trl", "from_verifiers", "from_verl"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mlrl.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__():
    return sorted(_MODULE_OF)
