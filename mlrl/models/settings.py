"""Settings of a config.json: each is read, or known to change nothing here, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlrl.types import Refused

# Settings that change no logit: of training elsewhere, of other heads, of how files and results are returned.
# Dropout too: mlrl trains without it.
NO_MATTER = frozenset("""
    architectures model_type
    _attn_implementation _attn_implementation_autoset _name_or_path attention_dropout attn_pdrop begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward dtype embd_pdrop eos_token_id id2label initializer_range
    label2id max_position_embeddings n_ctx n_positions num_labels output_attentions output_hidden_states
    output_router_logits pad_token_id pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict
    router_aux_loss_coef router_jitter_noise summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj task_specific_params torch_dtype transformers_version unk_token_id use_cache
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

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
        value = self.any(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (
                least <= value <= most and value == int(value)):  # fmt: skip
            raise self.refused(name, f"a whole number from {least} to {most:,}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.any(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self.refused(name, "a number")
        return float(value)

    def choice(self, name: str, known: Iterable[str], default: str) -> str:
        value = self.any(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.refused(name, ", ".join(known))
        return value

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
