"""Batches before anybody has looked at them: rows, and what they earned."""

from __future__ import annotations

import jax.numpy as jnp

from mlrl.types import Batch, Rewards, Rollout


def unannotated(rollout: Rollout, rewards: Rewards | None = None) -> Batch:
    """A Batch of rows about which nothing is known yet: NaN where something could be missed, never 0.

    Args:
      rollout: [B,L].
      rewards: what the rows earned; without it every row counts as scored, with reward 0 (supervised data).
    """
    b, length = rollout.tokens.shape
    zeros, missing = jnp.zeros((b, length), jnp.float32), jnp.full((b, length), jnp.nan, jnp.float32)
    if rewards is None:
        rewards = Rewards(tokens=zeros, outcome=jnp.zeros((b,), jnp.float32), scored=jnp.ones((b,), bool), parts={})
    return Batch(
        rollout=rollout, rewards=rewards, old_log_probs=missing, reference_log_probs=missing, values=missing,
        advantages=missing, returns=missing, mask=rollout.action_mask & rewards.scored[:, None],
        weights=zeros, token_weights=zeros,
    )  # fmt: skip
