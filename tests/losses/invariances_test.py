"""What holds for every loss: padding, row order and micro-batches change nothing; masked slots reach nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build

from mlrl import divergences, importance, reductions
from mlrl.losses import (
    corrections,
    distillation,
    policy,
    preference,
    regularizers,
    reward_models,
    supervised,
    values,
)

with_ = functools.partial
LOSSES = {
    "ppo_clip": policy.ppo_clip,
    "dual_clip": with_(policy.dual_clip, clip_dual=1.5),
    "gspo": policy.gspo,
    "gspo_token": policy.gspo_token,
    "cispo": policy.cispo,
    "reinforce": policy.reinforce,
    "sapo": policy.sapo,
    "vespo": policy.vespo,
    "stable_reinforce": with_(policy.stable_reinforce, max_ratio=2.0),
    "decoupled_ppo": corrections.decoupled_ppo,
    "nft": policy.nft,
    "dppo_tv": policy.dppo_tv,
    "trajectory_balance": policy.trajectory_balance,
    "corrected": with_(
        corrections.corrected, weight_fn=with_(importance.weights, level=importance.sequence_mean, high=1.1)
    ),
    "kl_penalty": with_(regularizers.kl_penalty, kl_coef=0.1),
    "kl_penalty_k2": with_(regularizers.kl_penalty, kl_coef=0.1, estimator=divergences.k2, limit=0.5),
    "kl_by_turn": with_(regularizers.kl_by_turn, kl_coefs=(0.1, 0.3)),
    "entropy_bonus": with_(regularizers.entropy_bonus, entropy_coef=0.1),
    "high_entropy_only": with_(regularizers.high_entropy_only, share=0.5),
    "clip_cov": with_(regularizers.clip_cov, low=0.05),
    "kl_cov": with_(regularizers.kl_cov, kl_coef=1.0, low=0.05),
    "next_token": supervised.next_token,
    "value_loss": values.value_loss,
    "clipped_value_loss": values.clipped_value_loss,
    "teacher_kl": with_(distillation.teacher_kl, kl_coef=1.0, gate=distillation.failed_rows),
    "dpo": with_(preference.dpo, nll_coef=0.5),
    "dpo_best_and_worst": with_(preference.dpo, pair_fn=preference.best_and_worst),
    "ipo": preference.ipo,
    "simpo": preference.simpo,
    "orpo": preference.orpo,
    "cpo": preference.cpo,
    "kto": preference.kto,
    "optimism": with_(preference.optimism, greedy_role=0),
    "bradley_terry": with_(reward_models.bradley_terry, margin=0.5, centre_coef=0.01),
    "plackett_luce": reward_models.plackett_luce,
    "step_labels": reward_models.step_labels,
}
MASK = np.zeros((8, 7), bool)
for row, (start, stop) in enumerate([(2, 7), (2, 4), (2, 6), (2, 3), (2, 7), (2, 5), (2, 2), (2, 6)]):
    MASK[row, start:stop] = True
MASK[4, 4] = False  # a hole, as multi-turn rows have
GROUP = [0, 0, 0, 0, 4, 4, 4, 4]
OUTCOME = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0, np.nan, 1.0]


ORDER = np.array([5, 2, 7, 0, 3, 6, 1, 4])
GROUPED = {  # losses that compare rows of a group: a piece must hold whole groups, here 4 rows
    "dpo", "dpo_best_and_worst", "ipo", "simpo", "orpo", "cpo", "optimism", "bradley_terry", "plackett_luce",
}  # fmt: skip


@pytest.fixture(params=LOSSES, name="name", scope="module")
def _name(request):
    return request.param


def evaluate(loss_fn, scores, batch):
    """(loss, metrics, gradients) by log-probs, entropy and values."""
    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(scores, batch)
    return loss, metrics, gradients


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), a, b)


def rows(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


@functools.cache
def plain(name):
    """The 8 rows as they are."""
    return jax.jit(lambda s, b: evaluate(LOSSES[name], s, b))(*example())


@functools.cache
def example():
    return build(MASK, group=GROUP, outcome=OUTCOME)


@functools.cache
def variants(name):
    """The 8 rows padded to 10 rows of 10 columns; the same in another order; and nothing masked in."""
    mask = np.pad(MASK, ((0, 2), (1, 2)))
    padded = build(mask, group=[*GROUP, 8, 8], outcome=[*OUTCOME, np.nan, np.nan])

    def place(x, like):
        fill = jnp.full(like.shape, jnp.nan, like.dtype) if jnp.issubdtype(like.dtype, jnp.floating) else like
        return fill.at[:8, 1:8].set(x) if x.ndim == 2 else fill.at[:8].set(x)

    scores, batch = jax.tree.map(place, example(), padded)
    batch = batch.replace(weights=padded[1].weights, token_weights=padded[1].token_weights)
    order = np.concatenate([ORDER, [9, 8]])
    empty = build(np.zeros_like(mask), group=[*GROUP, 8, 8], outcome=[*OUTCOME, np.nan, np.nan])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), (scores, batch), rows((scores, batch), order), empty)
    found = jax.jit(jax.vmap(lambda s, b: evaluate(LOSSES[name], s, b)))(*stacked)
    return [rows(found, i) for i in range(3)]


def test_masked_slots_reach_nothing(name):
    loss, metrics, gradients = plain(name)
    assert np.isfinite(float(loss)) and float(loss) != 0.0
    assert all(np.isfinite(float(m)) and m.shape == () for m in metrics.values())
    gradients = jnp.stack(jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[:, ~MASK], np.zeros_like(gradients[:, ~MASK]))
    assert np.isfinite(gradients).all() and np.abs(gradients).max() > 0


def test_splits_into_micro_batches_add_up(name):
    loss, metrics, gradients = plain(name)
    pieces = 2 if name in GROUPED else 4
    split = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), example())
    parts = jax.jit(jax.vmap(lambda s, b: evaluate(LOSSES[name], s, b)))(*split)
    assert_same(jax.tree.map(lambda x: x.sum(axis=0), parts[:2]), (loss, metrics))
    assert_same(jax.tree.map(lambda g: g.reshape(8, 7), parts[2]), gradients)


def test_padding_changes_nothing(name):
    loss, metrics, gradients = plain(name)
    padded = variants(name)[0]
    assert_same(padded[:2], (loss, metrics))
    assert_same(jax.tree.map(lambda g: g[:8, 1:8], padded[2]), gradients)


def test_the_order_of_rows_does_not_matter(name):
    loss, metrics, gradients = plain(name)
    shuffled = variants(name)[1]
    assert_same(shuffled[:2], (loss, metrics))
    assert_same(jax.tree.map(lambda g: g[:8, 1:8], shuffled[2]), rows(gradients, ORDER))


def test_an_empty_mask_gives_zero_and_finite_gradients(name):
    loss, metrics, gradients = variants(name)[2]
    assert float(loss) == 0.0
    assert all(float(m) == 0.0 for m in metrics.values())
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros((10, 10)))


@pytest.mark.parametrize("shards", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2)), 4])
@pytest.mark.parametrize("name", ["ppo_clip", "clipped_value_loss", "dpo"])
def test_data_shards_change_nothing(name, shards):
    """With the weights made inside the jit, the denominator is that of all shards together."""

    def whole_step(scores, batch):
        weights = reductions.sequence_mean_token_mean(batch.mask)
        token_weights = reductions.token_mean(batch.mask)
        return evaluate(LOSSES[name], scores, batch.replace(weights=weights, token_weights=token_weights))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:shards]), ("data",))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert_same(jax.jit(whole_step)(*jax.device_put(example(), by_rows)), plain(name))


@pytest.mark.parametrize(
    "loss_fn",
    [
        with_(regularizers.kl_penalty, kl_coef=0.0),
        with_(regularizers.entropy_bonus, entropy_coef=0.0),
        with_(regularizers.kl_cov, kl_coef=0.0),
        with_(values.value_loss, value_coef=0.0),
        with_(values.clipped_value_loss, value_coef=0.0),
        with_(distillation.teacher_kl, kl_coef=0.0),
    ],
    ids=lambda f: f.func.__name__,
)
def test_a_term_that_is_off_reads_nothing(loss_fn):
    leaves = jax.make_jaxpr(loss_fn)(*example()).jaxpr
    assert not leaves.eqns or not {v for e in leaves.eqns for v in e.invars if v in leaves.invars}
    loss, metrics = loss_fn(*example())
    assert float(loss) == 0.0 and metrics == {}
