"""Choosing the next token: filters on a distribution, and the draw."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mlrl.types import Array, Refused, require_whole


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the temperature first, then top-k, then top-p.

    temperature  divides the logits; 0.0: the likeliest token. One chosen while the program runs is an array [], above 0
    top_k        only so many of the likeliest tokens; 0: all
    top_p        only the likeliest tokens that together have this probability; 1.0: all
    """

    temperature: float | Array = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name in ("top_p",) if self.chosen_late else ("temperature", "top_p"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise Refused(f"Sampling.{name} must be a number, got {getattr(self, name)!r}")
        require_whole("Sampling", "top_k", self.top_k, 0)
        if not self.chosen_late and self.temperature < 0.0:
            raise Refused(f"Sampling.temperature must be at least 0.0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise Refused(f"Sampling.top_p must lie in (0, 1], got {self.top_p}")

    @property
    def chosen_late(self) -> bool:
        """Whether the temperature is an array."""
        return isinstance(self.temperature, Array)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.chosen_late and self.temperature == 0.0

    @property
    def filtered(self) -> bool:
        """Whether tokens of the full distribution are left out."""
        return self.top_k > 0 or self.top_p < 1.0


GREEDY = Sampling(temperature=0.0)

_NEVER = jnp.finfo(jnp.float32).min


def top_k_filter(log_probs: Array, k: int) -> Array:
    """Keeps the k most probable tokens and renormalizes; k = 0 keeps all. [B,V] -> [B,V].

    Ties with the k-th token are all kept. Reference: Fan et al. 2018.
    """
    if k <= 0 or k >= log_probs.shape[-1]:
        return log_probs
    threshold = jax.lax.top_k(log_probs, k)[0][..., -1:]
    return jax.nn.log_softmax(jnp.where(log_probs >= threshold, log_probs, _NEVER), axis=-1)


def top_p_filter(log_probs: Array, p: float) -> Array:
    """Keeps the smallest set of most probable tokens whose mass reaches p, renormalized; p = 1 keeps all.

    A token is kept if the mass *before* it, in order of probability, is below p; the most probable token is
    always kept. Reference: Holtzman et al. 2019.
    """
    if p >= 1.0:
        return log_probs
    ordered = -jnp.sort(-log_probs, axis=-1)
    mass_before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    threshold = jnp.min(jnp.where(mass_before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(log_probs >= threshold, log_probs, _NEVER), axis=-1)


def draw_tokens(keys: Array, log_probs: Array, *, greedy: bool) -> Array:
    """One token a row, by the Gumbel-max trick with a key of its own for every row; greedy: the argmax.

    A row's draw depends on its key alone, so it is the same wherever and beside whatever the row is sampled.

    Args:
      keys: [B] PRNG keys.
      log_probs: [B,V] float32.
    Returns: [B] int32.
    """
    if not greedy:
        log_probs = log_probs + jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[-1:]))(keys)
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
