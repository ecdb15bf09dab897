"""Batches of rewarded rows for tests, with NaN in every slot that nothing may read."""

import jax.numpy as jnp
import numpy as np

from mlrl.types import Batch, Rewards, Rollout


def build(
    mask, rewards, *, group, outcome=None, scored=None, parts=None, turn=None, role=None, truncated=None, **given
):
    """A batch in which everything outside the action mask is NaN; `rewards` [B] sit on each row's last action."""
    mask = np.asarray(mask, bool)
    b, length = mask.shape
    rewards = np.asarray(rewards, np.float32)
    if rewards.ndim == 1:
        last = length - 1 - np.argmax(mask[:, ::-1], axis=1)
        tokens = np.zeros((b, length), np.float32)
        tokens[np.arange(b), last] = rewards
    else:
        tokens = rewards
    scored = np.ones(b, bool) if scored is None else np.asarray(scored)
    nan = jnp.full((b, length), jnp.nan)
    inside = lambda name: jnp.where(mask, jnp.asarray(given[name], jnp.float32), jnp.nan) if name in given else nan
    ints = lambda x, shape: jnp.zeros(shape, jnp.int32) if x is None else jnp.asarray(x, jnp.int32)
    batch = Batch(
        rollout=Rollout(
            tokens=jnp.ones((b, length), jnp.int32),
            valid=jnp.asarray(given.get("valid", mask)),
            action_mask=jnp.asarray(mask),
            behavior_log_probs=nan,
            turn=ints(turn, (b, length)),
            role=ints(role, (b,)),
            group=jnp.asarray(group, jnp.int32),
            truncated=jnp.zeros(b, bool) if truncated is None else jnp.asarray(truncated),
            policy_version=ints(None, (b,)),
        ),
        rewards=Rewards(
            tokens=jnp.asarray(np.where(given.get("valid", mask), tokens, np.nan)),
            outcome=jnp.asarray(tokens.sum(1) if outcome is None else outcome, jnp.float32),
            scored=jnp.asarray(scored),
            parts={k: jnp.asarray(v, jnp.float32) for k, v in (parts or {}).items()},
        ),
        old_log_probs=inside("old_log_probs"),
        reference_log_probs=inside("reference_log_probs"),
        values=inside("values"),
        advantages=nan,
        returns=nan,
        mask=jnp.asarray(mask & scored[:, None]),
        weights=jnp.zeros((b, length)),
        token_weights=jnp.zeros((b, length)),
    )
    return batch.check()
