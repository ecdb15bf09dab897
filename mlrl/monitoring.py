"""What a step reports about its rows, and how often anything was compiled."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp

from mlrl.groups import zero_spread
from mlrl.types import Batch, Metrics

_compilations = 0


def _count_compilation(event: str, duration_seconds: float, **_) -> None:
    global _compilations
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def compilations() -> int:
    """How many programs this process has compiled (or read from the compilation cache) since mlrl was imported."""
    return _compilations


def row_metrics(batch: Batch) -> Metrics:
    """Lengths of the rows' actions in tokens, their sum, and the share of columns that hold no token."""
    rollout = batch.rollout
    lengths = jnp.sum(rollout.action_mask, axis=1).astype(jnp.float32)
    return {
        "length/mean": jnp.mean(lengths),
        "length/max": jnp.max(lengths),
        "tokens": jnp.sum(lengths),
        "padding_share": 1.0 - jnp.mean(rollout.valid.astype(jnp.float32)),
    }


def reference_metrics(batch: Batch, reads: Collection[str]) -> Metrics:
    """The raw KL of the policy before the update to its reference, by k1, if both are known.

    "kl/reference_token" is a mean over the step's tokens, "kl/reference_row" over its rows' sums: what Ziegler et al.
    2019 steer by, whether the penalty stands in the reward or in the loss.
    """
    if not {"Batch.old_log_probs", "Batch.reference_log_probs"} <= set(reads):
        return {}
    actions = batch.rollout.action_mask & batch.rewards.scored[:, None]
    difference = jnp.where(actions, batch.old_log_probs - batch.reference_log_probs, 0.0)
    total = jnp.sum(difference)
    return {"kl/reference_token": total / jnp.maximum(jnp.sum(actions), 1),
            "kl/reference_row": total / jnp.maximum(jnp.sum(actions.any(axis=1)), 1)}  # fmt: skip


def step_metrics(batch: Batch) -> Metrics:
    """Means over the rows of a step: rewards and their parts, lengths in tokens, and shares of rows.

    Unscored rows are in `unscored_share` and in no mean of rewards. `zero_spread_share` is the share of rows whose
    group's unshaped outcomes are all equal: they teach a group baseline nothing. `kept_share` is the share of scored
    rows that the selection kept.
    """
    rollout, rewards = batch.rollout, batch.rewards
    scored = rewards.scored.astype(jnp.float32)
    mean = lambda x: jnp.sum(jnp.where(rewards.scored, x, 0.0)) / jnp.maximum(jnp.sum(scored), 1.0)  # noqa: E731
    share = lambda x: jnp.mean(x.astype(jnp.float32))  # noqa: E731
    kept = jnp.any(batch.mask, axis=1)
    metrics = row_metrics(batch) | {
        "reward": mean(jnp.sum(rewards.tokens, axis=1)),
        "accuracy": mean((rewards.outcome > 0.5).astype(jnp.float32)),
        "truncated_share": share(rollout.truncated),
        "unscored_share": 1.0 - share(rewards.scored),
        "zero_spread_share": share(zero_spread(rewards.outcome, rollout.group, rewards.scored)),
        "kept_share": jnp.sum(kept) / jnp.maximum(jnp.sum(scored), 1.0),
    }
    for name, part in rewards.parts.items():
        is_share = name.startswith("unscored/")
        metrics[name if is_share else f"reward/{name}"] = share(part) if is_share else mean(part)
    return metrics


def value_metrics(batch: Batch, reads: Collection[str]) -> Metrics:
    """{"value/explained_variance": 1 - Var(return - value) / Var(return)} over all masked tokens of a step.

    Of the values before the update; {} where nothing reads them. 1 is perfect, 0 no better than a constant, below 0
    worse, NaN where the returns do not vary. No mean over minibatches gives it, so it is no metric of a loss. With a
    lambda below 1 the returns hold values themselves, and it flatters. On the host: mlrl.metrics.explained_variance.
    """
    if "Batch.values" not in reads:
        return {}
    count = jnp.maximum(jnp.sum(batch.mask), 1)
    mean = lambda x: jnp.sum(jnp.where(batch.mask, x, 0.0)) / count  # noqa: E731
    variance = lambda x: mean(jnp.square(x - mean(x)))  # noqa: E731
    total = variance(batch.returns)
    varies = total > 1e-10 * mean(jnp.square(batch.returns))  # more than the rounding of their mean
    ratio = variance(batch.returns - batch.values) / jnp.where(varies, total, 1.0)
    return {"value/explained_variance": jnp.where(varies, 1.0 - ratio, jnp.nan)}
