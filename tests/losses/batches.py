"""Small random batches for the loss tests. Everything outside the mask is NaN, so a leak shows in every test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import reductions
from mlrl.types import Batch, Rewards, Rollout, Scores


def build(mask, *, group, outcome, seed=0, reduction=reductions.sequence_mean_token_mean, **given):
    """(scores, batch) with random contents; `given` replaces arrays of scores and batch by name."""
    rng = np.random.default_rng(seed)
    mask = np.asarray(mask, bool)
    b, length = mask.shape
    inside = lambda x: jnp.asarray(np.where(mask, x, np.nan), jnp.float32)
    log_probs = lambda: inside(-rng.gamma(2.0, 0.5, (b, length)))
    zeros = jnp.zeros((b,), jnp.int32)
    arrays = {
        "log_probs": log_probs(),
        "old_log_probs": log_probs(),
        "reference_log_probs": log_probs(),
        "behavior_log_probs": log_probs(),
        "entropy": inside(rng.random((b, length))),
        "scored_values": inside(rng.normal(size=(b, length))),
        "values": inside(rng.normal(size=(b, length))),
        "advantages": inside(rng.uniform(-0.9, 0.9, (b, length))),
        "returns": inside(rng.normal(size=(b, length))),
        "reward_tokens": inside(rng.random((b, length))),
        "role": zeros,
        "truncated": jnp.zeros((b,), bool),
    }
    unknown = set(given) - set(arrays)
    assert not unknown, f"build() has no array {unknown}"
    arrays |= {name: jnp.asarray(x) for name, x in given.items()}
    rollout = Rollout(
        tokens=jnp.ones((b, length), jnp.int32),
        valid=jnp.asarray(mask),
        action_mask=jnp.asarray(mask),
        behavior_log_probs=arrays["behavior_log_probs"],
        turn=jnp.zeros((b, length), jnp.int32),
        role=arrays["role"],
        group=jnp.asarray(group, jnp.int32),
        truncated=arrays["truncated"],
        policy_version=zeros,
    )
    rewards = Rewards(
        tokens=arrays["reward_tokens"],
        outcome=jnp.asarray(outcome, jnp.float32),
        scored=jnp.asarray(mask.any(axis=1)),
        parts={},
    )
    batch = Batch(
        rollout=rollout,
        rewards=rewards,
        mask=jnp.asarray(mask),
        weights=reduction(mask),
        token_weights=reductions.token_mean(mask),
        **{n: arrays[n] for n in ("old_log_probs", "reference_log_probs", "values", "advantages", "returns")},
    )
    scores = Scores(log_probs=arrays["log_probs"], entropy=arrays["entropy"], values=arrays["scored_values"])
    return scores.check(), batch.check()


# Plain, every operation is compiled by itself; tests/presets_test.py calls losses so in `make test`, too.
plain = pytest.param(lambda f: f, marks=pytest.mark.slow, id="plain")
jit_and_plain = pytest.mark.parametrize("wrap", [pytest.param(jax.jit, id="jit"), plain])
