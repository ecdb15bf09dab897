"""Packed rows score and learn as rows read one by one, and hold hardly any padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import packing, scoring
from mlrl.models.fused import by_platform
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.types import Prompts, Refused, Rollout

V, B, L = 13, 10, 12
SHAPE = dict(vocabulary_size=V, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24, value_head=True)


def rows(seed=0):
    """Rows with padding on both sides, one of them full, one of a single token."""
    keys = jax.random.split(jax.random.key(seed), 3)
    first = jax.random.randint(keys[0], (B,), 0, 4).at[0].set(0).at[1].set(3)
    last = (first + jax.random.randint(keys[1], (B,), 2, 9)).at[0].set(L).at[1].set(4)
    column = jnp.arange(L)
    valid = (column >= first[:, None]) & (column < last[:, None])
    tokens = jax.random.randint(keys[2], (B, L), 0, V)
    no = jnp.zeros((B, L))
    return Rollout(tokens=tokens, valid=valid, action_mask=valid, behavior_log_probs=no, turn=no.astype(jnp.int32),
                   role=jnp.zeros(B, jnp.int32), group=jnp.arange(B), truncated=jnp.zeros(B, bool),
                   policy_version=jnp.zeros(B, jnp.int32))  # fmt: skip


def learned(score, model, params, rollout):
    """Scores of tokens that another precedes, and the gradient of a function of them."""
    counted = rollout.valid & (jnp.cumsum(rollout.valid, 1) > 1)

    def total(params):
        said = score(model, params, rollout, temperature=0.8, with_logits=True, top_tokens=3)
        kept = jax.tree.map(lambda x: jnp.where(counted.reshape(B, L, *[1] * (x.ndim - 2)), x, 0), said)
        value = sum(jnp.sum(jnp.sin(x)) for x in (kept.log_probs, kept.entropy, kept.values, kept.logits))
        return value, kept

    gradient, kept = jax.jit(jax.grad(total, has_aux=True))(params)
    return kept, gradient


@pytest.mark.parametrize("more", [{}, {"windows": (3, 0)}, {"critic_layers": 1}], ids=str)
@pytest.mark.parametrize("size", [dict(rows=4, columns=16), dict(rows=2, columns=40), dict(rows=2, columns=16)],
                         ids=["four rows", "two rows", "no room"])  # fmt: skip
def test_packed_rows_score_and_learn_as_they_do_alone(more, size):
    model = Transformer(Config(**SHAPE, **more))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape),
                          initialize(model, jax.random.key(0)))  # fmt: skip
    rollout = rows()
    assert bool(packing.lay_out(rollout.valid, **size).fits) == (size != dict(rows=2, columns=16))
    found = learned(functools.partial(packing.score, **size), model, params, rollout)
    wanted = learned(scoring.score, model, params, rollout)
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_first_fit_by_hand():
    lengths = jnp.array([2, 5, 3, 4, 1])
    valid = jnp.arange(6) < lengths[:, None]
    layout = packing.lay_out(valid, 3, 6)
    # 5 opens row 0, 4 row 1, 3 row 2; 2 joins row 1, and 1 row 0.
    np.testing.assert_array_equal(layout.row, [1, 0, 2, 1, 0])
    np.testing.assert_array_equal(layout.start, [4, 0, 0, 0, 5])
    assert bool(layout.fits) and not bool(packing.lay_out(valid, 2, 6).fits)


def test_a_heavy_tail_leaves_less_than_a_tenth_of_padding():
    shares, plain = [], []
    for seed in range(20):
        lengths = np.minimum(np.random.default_rng(seed).geometric(1 / 24, 256), 128)
        valid = jnp.arange(128) < lengths[:, None]
        rows = -(-int(lengths.sum()) // 256) + 1  # a row of 256 tokens more than there are tokens for
        assert bool(jax.jit(packing.lay_out, static_argnums=(1, 2))(valid, rows, 256).fits)
        shares.append(1 - lengths.sum() / (rows * 256))
        plain.append(1 - lengths.mean() / 128)
    assert max(shares) < 0.1 < 0.7 < min(plain)


def test_packing_compiles_once_whatever_the_lengths():
    model = Transformer(Config(**SHAPE))
    params = initialize(model, jax.random.key(0))
    score = jax.jit(functools.partial(packing.score, model, rows=4, columns=24))
    for seed in range(4):
        score(params, rows(seed))
    assert score._cache_size() == 1


def test_kernels_that_know_only_causal_masks_are_refused():
    model = Transformer(Config(**SHAPE, attention=by_platform))
    with pytest.raises(Refused, match="attention.attend"):
        packing.score(model, initialize(model, jax.random.key(0)), rows(), rows=4, columns=24)


def test_the_online_loop_s_forward_scores_the_columns_after_the_prompt():
    model, rollout = Transformer(Config(**SHAPE)), rows()
    params = initialize(model, jax.random.key(0))
    prompts = Prompts(rollout.tokens[:, :4], rollout.valid[:, :4], jnp.zeros(B, jnp.int32), jnp.arange(B), {})
    found, wanted = (jax.jit(lambda f=f: f.score(model, params, prompts, rollout, *f.prepare(model, params, prompts)))()
                     for f in (packing.packed(rows=4, columns=16), scoring.whole_rows()))  # fmt: skip
    counted = rollout.valid & (jnp.cumsum(rollout.valid, 1) > 1)
    np.testing.assert_allclose(found.log_probs, jnp.where(counted, wanted.log_probs, 0.0), atol=2e-5)
    assert not bool(jnp.any(found.log_probs[:, :4])) and bool(jnp.any(found.log_probs[:, 4:]))
