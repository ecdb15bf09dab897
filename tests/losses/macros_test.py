"""Losses on macro actions: a ratio for each chunk and a value for each, by hand and against the token-level losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build

from mlrl import advantages, reductions, returns
from mlrl.losses import macros, policy, values

with_ = functools.partial
TWO = with_(advantages.fixed_chunks, tokens=2)


def batch_of(length=3, **given):
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in given.items()}
    return build(np.ones((1, length), bool), group=[0], outcome=[0.0], reduction=reductions.token_mean, **arrays)


def run(loss_fn, scores, batch):
    """(loss, metrics, gradient)."""
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(lambda s: loss_fn(s, batch), has_aux=True))(scores)
    return float(loss), metrics, gradient


def rng_batch():
    rng = np.random.default_rng(0)
    return batch_of(6, advantages=np.repeat(rng.normal(size=(1, 3)), 2, axis=1), old_log_probs=rng.normal(size=(1, 6)),
                    log_probs=rng.normal(size=(1, 6)), values=rng.normal(size=(1, 6)),
                    returns=rng.normal(size=(1, 6)))  # fmt: skip


def test_the_ratio_of_a_chunk_by_hand():
    """Chunks {a, b}, {c}: log-ratios 0.1 - 0.2 and 0.5, advantages 1 and 2; the second is clipped at 1.2."""
    scores, batch = batch_of(log_probs=[[-0.9, -1.2, -0.5]], old_log_probs=[[-1, -1, -1]], advantages=[[1, 1, 2]])
    loss, metrics, gradient = run(with_(macros.ratio_of_chunks, termination=TWO), scores, batch)
    assert loss == pytest.approx(-(2 * np.exp(-0.1) + 2 * 1.2) / 3, rel=1e-5)
    assert float(metrics["ratio/clipped_share"]) == pytest.approx(1 / 3)
    # each token of {a, b} moves the ratio of both
    np.testing.assert_allclose(gradient.log_probs, [[-2 * np.exp(-0.1) / 3] * 2 + [0.0]], rtol=1e-5)
    mean = with_(macros.ratio_of_chunks, termination=TWO, ratio_of=returns.chunk_mean)
    assert run(mean, scores, batch)[0] == pytest.approx(-(2 * np.exp(-0.05) + 2 * 1.2) / 3, rel=1e-5)


def test_ratios_of_chunks_are_ppos_for_single_tokens_and_gspos_for_sequences():
    scores, batch = rng_batch()
    gspo = with_(policy.gspo, clip_low=0.2, clip_high=0.2)
    of_rows = with_(macros.ratio_of_chunks, termination=advantages.whole_sequence, ratio_of=returns.chunk_mean)
    of_tokens = with_(macros.ratio_of_chunks, termination=advantages.single_tokens)
    for ours, theirs in ((of_tokens, policy.ppo_clip), (of_rows, gspo)):
        a, b = run(ours, scores, batch), run(theirs, scores, batch)
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        np.testing.assert_allclose(a[2].log_probs, b[2].log_probs, rtol=1e-4, atol=1e-6)


def test_values_learn_where_a_chunk_begins():
    """Chunks {a, b}, {c}: errors 2 and 1, weighed 2/3 and 1/3; the value at b has no gradient."""
    scores, batch = batch_of(scored_values=[[1.0, 50.0, 2.0]], returns=[[3.0, 3.0, 3.0]])
    loss_fn = with_(macros.at_beginnings, termination=TWO, loss_fn=values.value_loss)
    loss, metrics, gradient = run(loss_fn, scores, batch)
    assert loss == pytest.approx(0.5 * (2 * 4 + 1) / 3)
    np.testing.assert_allclose(gradient.values, [[-2 * 2 / 3, 0.0, -1 / 3]], rtol=1e-5)
    assert float(metrics["value/mean"]) == pytest.approx((2 * 1 + 2) / 3)


def test_values_of_single_tokens_are_those_of_ppo():
    scores, batch = rng_batch()
    single = with_(macros.at_beginnings, termination=advantages.single_tokens, loss_fn=values.value_loss)
    a, b = run(single, scores, batch), run(values.value_loss, scores, batch)
    assert a[0] == b[0]
    np.testing.assert_array_equal(a[2].values, b[2].values)
