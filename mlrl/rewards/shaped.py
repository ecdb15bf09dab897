"""Shaping of a learned reward, or of any proxy: a row's reward goes through a function that is hard to exploit.

Each takes a reward and puts a function of the row's sum on its last action. The outcome stays what it was, so that a
proxy whose outcome is the truth (`combinators.weighted_sum` of the truth and of what the proxy overrates) shows both:
the part `<name>/raw` is the proxy, accuracy the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlrl.rewards.combinators import Reward
from mlrl.rewards.lifting import at_last_action, lift
from mlrl.types import Array, Models, Prompts, Refused, RewardFn, Rewards, Rollout

ShapeFn = Callable[[dict[str, Array], Array], Array]  # (statistics, sums [B]) -> [B]


def par(reward: Reward, *, steepness: float = 1.0, seed: int = 0) -> RewardFn:
    """Preference as reward: how likely the row is preferred to answers of the frozen reference to the same prompt.

        shaped_i = mean over m of sigmoid(steepness * (r_i - r_ref,m))

    The M answers are the reference's, sampled in every step: one for each row of the group, which all its rows share.

    Args:
      reward: the proxy. It is asked for the reference's answers too; a state of its own is advanced by the rows alone.
      steepness: k.
      seed: of the reference's answers.
    Returns: a RewardFn with the parts `par`, `par/raw` and `par/reference` (the proxy of the reference's answers).
    Raises: Refused, unless steepness is above 0.
    Reference: Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF". Departure: theirs are 10 answers of
      a prompt that are sampled once and kept. Left out: a penalty of 0.01 for each token beyond 300, which all their
      arms have (`graph.overlong` is one), and the KL in the reward (`advantages.kl_in_reward`).
    """
    if not steepness > 0:
        raise Refused(f"par: steepness must be above 0, got {steepness}")
    return _against_reference("par", reward, lambda difference: jax.nn.sigmoid(steepness * difference), seed)


def centred_linear(reward: Reward, *, slope: float = 0.25, seed: int = 0) -> RewardFn:
    """The control of `par` that is as steep at 0 and never flat: slope * mean over m of (r_i - r_ref,m)."""
    return _against_reference("centred_linear", reward, lambda difference: slope * difference, seed)


def sigmoid(reward: Reward, *, steepness: float = 1.0, shift: float = 0.0) -> RewardFn:
    """A sigmoid that is not centred by any reference: sigmoid(steepness * (r - shift))."""
    return _by_statistics("sigmoid", reward, lambda _, sums: jax.nn.sigmoid(steepness * (sums - shift)))


def standardize(reward: Reward, *, eps: float = 1e-6) -> RewardFn:
    """Less the mean, over the standard deviation of all rows so far, the step's own among them."""
    return _by_statistics("standardize", reward, lambda s, sums: (sums - s["mean"]) / (_deviation(s) + eps))


def clip_to_deviation(reward: Reward, *, deviations: float = 1.0) -> RewardFn:
    """Clipped to mean +- `deviations` standard deviations of all rows so far, the step's own among them."""

    def clip(s: dict[str, Array], sums: Array) -> Array:
        room = deviations * _deviation(s)
        return jnp.clip(sums, s["mean"] - room, s["mean"] + room)

    return _by_statistics("clip_to_deviation", reward, clip)


def minmax(reward: Reward, *, eps: float = 1e-6) -> RewardFn:
    """From 0 at the least to 1 at the largest of all rows so far, the step's own among them."""
    return _by_statistics("minmax", reward, lambda s, sums: (sums - s["low"]) / (s["high"] - s["low"] + eps))


def statistics() -> dict[str, Array]:
    """Of no rows yet: how many, their mean, squared deviations from it, least and largest; all [] float32."""
    return {"count": jnp.zeros(()), "mean": jnp.zeros(()), "squares": jnp.zeros(()),
            "low": jnp.float32(jnp.inf), "high": jnp.float32(-jnp.inf)}  # fmt: skip


def with_rows(found: dict[str, Array], sums: Array, scored: Array) -> dict[str, Array]:
    """The statistics with the scored rows of `sums` [B] added; without rounding away what is small beside the mean.

    Reference: Chan, Golub, LeVeque 1983, on the mean and squares of two parts together.
    """
    rows = scored.sum().astype(jnp.float32)
    mean = jnp.where(scored, sums, 0.0).sum() / jnp.maximum(rows, 1.0)
    squares = jnp.where(scored, jnp.square(sums - mean), 0.0).sum()
    count, apart = found["count"] + rows, mean - found["mean"]
    share = rows / jnp.maximum(count, 1.0)
    return {
        "count": count,
        "mean": found["mean"] + apart * share,
        "squares": found["squares"] + squares + jnp.square(apart) * found["count"] * share,
        "low": jnp.minimum(found["low"], jnp.where(scored, sums, jnp.inf).min()),
        "high": jnp.maximum(found["high"], jnp.where(scored, sums, -jnp.inf).max()),
    }


def _deviation(found: dict[str, Array]) -> Array:
    return jnp.sqrt(found["squares"] / jnp.maximum(found["count"], 1.0))


def _by_statistics(name: str, reward: Reward, shape: ShapeFn) -> RewardFn:
    """A RewardFn that remembers the statistics of the rows' sums and shapes each by them."""
    inner = lift(reward)

    def update(state: Any, rollout: Rollout, prompts: Prompts, task: Any, models: Models) -> tuple[Rewards, Any]:
        found, inner_state = inner.update(state["inner"], rollout, prompts, task, models)
        sums, scored = jnp.asarray(found.tokens).sum(axis=1), jnp.asarray(found.scored)
        seen = with_rows(state["seen"], sums, scored)
        shaped = jnp.where(scored, shape(seen, sums), 0.0)
        rewards = _on_last_action(found, rollout, shaped, {name: shaped, f"{name}/raw": sums})
        return rewards if inner.in_graph else jax.device_get(rewards), {"inner": inner_state, "seen": seen}

    names = (*inner.names, name, f"{name}/raw")
    return RewardFn(lambda: {"inner": inner.init(), "seen": statistics()}, update, inner.in_graph, names)


def _against_reference(name: str, reward: Reward, shape: Callable[[Array], Array], seed: int) -> RewardFn:
    """A RewardFn that shapes differences [B,B] to what the reference's answers to the same prompt earn."""
    inner = lift(reward)
    if not inner.in_graph:
        raise Refused(f"{name} asks the reference, which is in the graph, but its reward is on the host: make one of "
                      "arrays, f(rollout, prompts)")  # fmt: skip

    def update(state: Any, rollout: Rollout, prompts: Prompts, task: Any, models: Models) -> tuple[Rewards, Any]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x706172), state["calls"])
        answers = models.generate_reference(prompts, key)
        found, inner_state = inner.update(state["inner"], rollout, prompts, task, models)
        theirs, _ = inner.update(state["inner"], answers, prompts, task, models)
        sums, group = found.tokens.sum(axis=1), jnp.asarray(rollout.group)
        rivals = (group[:, None] == group[None, :]) & theirs.scored[None, :]
        shares = rivals / jnp.maximum(rivals.sum(axis=1, keepdims=True), 1)
        mean = lambda x: jnp.sum(jnp.where(rivals, x, 0.0) * shares, axis=1)  # noqa: E731
        reference = theirs.tokens.sum(axis=1)
        scored = found.scored & rivals.any(axis=1)
        shaped = jnp.where(scored, mean(shape(sums[:, None] - reference[None, :])), 0.0)
        parts = {name: shaped, f"{name}/raw": sums, f"{name}/reference": mean(reference[None, :])}
        rewards = _on_last_action(found.replace(scored=scored), rollout, shaped, parts)
        return rewards, {"inner": inner_state, "calls": state["calls"] + 1}

    names = (*inner.names, name, f"{name}/raw", f"{name}/reference")
    return RewardFn(lambda: {"inner": inner.init(), "calls": jnp.int32(0)}, update, True, names)


def _on_last_action(found: Rewards, rollout: Rollout, values: Array, parts: dict[str, Array]) -> Rewards:
    """The rewards with their tokens replaced by `values` [B] on the last action, and more parts."""
    tokens = at_last_action(values, jnp.asarray(rollout.action_mask))
    return found.replace(tokens=tokens, parts=found.parts | parts)
