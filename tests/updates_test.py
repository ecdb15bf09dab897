"""The update: exact denominators however the rows are split, skipped steps, and what is read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlrl import batches, meshes, reductions, updates
from mlrl.losses import policy, preference, regularizers, reward_models, supervised
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.optimizers import adamw
from mlrl.scoring import score
from mlrl.types import Refused, Rewards, Rollout, Scores, TrainState

V, B, L = 11, 8, 10
MODEL = Transformer(Config(vocabulary_size=V, width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24))


@functools.cache
def params():
    return initialize(MODEL, jax.random.key(0))


def batch(seed=0):
    """Rows of very different lengths, one of them without any action and one unscored."""
    lengths = jnp.asarray([1, 7, 3, 0, 5, 2, 6, 4])
    columns = jnp.arange(L)[None]
    action = (columns >= 3) & (columns < 3 + lengths[:, None])
    keys = jax.random.split(jax.random.key(seed), 4)
    rollout = Rollout(
        tokens=jax.random.randint(keys[0], (B, L), 0, V), valid=columns < 3 + lengths[:, None], action_mask=action,
        behavior_log_probs=jnp.where(action, -2.0 + 0.3 * jax.random.normal(keys[1], (B, L)), 0.0),
        turn=jnp.zeros((B, L), jnp.int32), role=jnp.zeros(B, jnp.int32), group=jnp.arange(B) // 2,
        truncated=jnp.zeros(B, bool), policy_version=jnp.zeros(B, jnp.int32),
    )  # fmt: skip
    rewards = Rewards(jnp.zeros((B, L)), jnp.zeros(B), jnp.asarray([True] * 6 + [False, True]), {})
    made = batches.unannotated(rollout.check(), rewards.check())
    return made.replace(
        old_log_probs=rollout.behavior_log_probs,
        reference_log_probs=rollout.behavior_log_probs - 0.1,
        advantages=jax.random.normal(keys[2], (B, L)),
    ).check()


def state(optimizer):
    return TrainState(jnp.int32(0), jax.random.key(1), params(), optimizer.init(params()), (), (), (), {}, jnp.int32(0))


LOSSES = (policy.ppo_clip, functools.partial(regularizers.kl_penalty, kl_coef=0.1))
REDUCTIONS = [
    reductions.token_mean,
    reductions.sequence_mean_token_mean,
    reductions.sequence_mean_token_sum,
    functools.partial(reductions.constant_length, length=7.0),
]


ADAMW, SCORE = adamw(learning_rate=0.01), functools.partial(score, MODEL)


@functools.cache
def program(**how):
    return jax.jit(functools.partial(updates.update, **how))


def run(rows, *, optimizer=ADAMW, **knobs):
    """An update by a program that is compiled once for all that call it with the same knobs."""
    how = {"losses": LOSSES, "reduction": reductions.token_mean, "score_fn": SCORE, **knobs}
    return program(optimizer=optimizer, **how)(state(optimizer), rows, jax.random.key(2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_only_add_up(reduction):
    whole, whole_metrics = run(batch(), reduction=reduction)
    for micro_batch_rows in (4, 2):
        split, metrics = run(batch(), reduction=reduction, micro_batch_rows=micro_batch_rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, split.params)
        for name, value in whole_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_data_shards_only_add_up(devices):
    whole, whole_metrics = run(batch())
    with meshes.use(meshes.mesh(devices=devices)):
        split, metrics = run(batch(), micro_batch_rows=4)
        lowered = jax.jit(meshes.split_rows).lower(jnp.zeros((B, 3))).compile().output_shardings
    assert "data" in str(lowered.spec), "the rows were not split at all"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, split.params)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_token_mean_is_one_mean_over_all_tokens():
    """The next-token loss by hand: the mean of -log p over every action of every scored row."""
    rows = batch()
    _, metrics = run(rows, losses=(supervised.next_token,), micro_batch_rows=2)
    log_probs = jax.jit(SCORE)(params(), rows.rollout).log_probs
    keep = np.asarray(rows.rollout.action_mask) & np.asarray(rows.rewards.scored)[:, None]
    np.testing.assert_allclose(metrics["loss"], -np.asarray(log_probs)[keep].mean(), rtol=1e-5)


def test_minibatches_and_epochs_make_optimizer_steps():
    for minibatches, epochs in ((1, 1), (4, 1), (2, 3), (1, 2)):
        after, _ = run(batch(), minibatches=minibatches, epochs=epochs)
        count = optax.tree_utils.tree_get(after.opt_state, "count", filtering=lambda p, _: "ScaleByAdam" in str(p))
        assert int(count) == minibatches * epochs


def test_a_batch_without_actions_changes_nothing_and_is_finite():
    rows = batch()
    after, metrics = run(rows.replace(mask=jnp.zeros_like(rows.mask)), optimizer=optax.sgd(1.0))
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after.params, params())


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    rows = batch()
    bad = rows.replace(advantages=rows.advantages.at[1, 4].set(jnp.nan))
    after, metrics = run(bad)
    assert int(after.bad_updates) == 1 and float(metrics["skipped_updates"]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, after.params, params())
    masked = rows.replace(advantages=rows.advantages.at[6].set(jnp.nan))  # row 6 is unscored
    after, metrics = run(masked)
    assert int(after.bad_updates) == 0 and np.isfinite(float(metrics["loss"]))


def test_a_step_is_skipped_where_the_scores_are_not_finite_whatever_the_loss_made_of_them():
    hides = lambda scores, batch: (jnp.sum(batch.weights * jnp.nan_to_num(scores.log_probs)), {})  # noqa: E731
    bad = lambda params, rollout: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), score(MODEL, params, rollout))  # noqa: E731
    for score_fn, skipped in ((bad, 1.0), (functools.partial(score, MODEL), 0.0)):
        _, metrics = run(batch(), losses=(hides,), score_fn=score_fn, micro_batch_rows=4)
        assert float(metrics["skipped_updates"]) == skipped


def test_bad_updates_count_in_a_row_only():
    rows = batch()
    bad = rows.replace(advantages=rows.advantages.at[:].set(jnp.inf))
    after, _ = run(bad, epochs=3)
    assert int(after.bad_updates) == 3


def test_what_a_loss_reads_is_found_by_tracing_it():
    scores = Scores(*(jnp.zeros((B, L)),) * 3)

    def reads(*losses):
        return updates.fields_read(lambda s, b: updates.total_loss(losses, s, b)[0], scores, batch())

    assert {"Batch.old_log_probs", "Batch.advantages", "Scores.log_probs"} <= reads(policy.ppo_clip)
    assert "Batch.reference_log_probs" not in reads(policy.ppo_clip)
    assert "Batch.reference_log_probs" in reads(*LOSSES)
    assert "Batch.reference_log_probs" not in reads(policy.ppo_clip, regularizers.kl_penalty)  # coefficient 0.0
    assert "Scores.values" not in reads(*LOSSES)


def pairs_of_rows():
    """Four pairs side by side, every row with an action and scored; group 1 has no action at all in one row."""
    rows = batch()
    outcome = jnp.asarray([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    rewards = rows.rewards.replace(outcome=outcome, scored=jnp.ones(B, bool))
    return rows.replace(rewards=rewards, mask=rows.rollout.action_mask).check()


def seen_pairs(minibatches, unit_rows, epochs=1):
    """The pairs (chosen, rejected) that each optimizer step of an epoch sees, as rows of the batch."""
    rows, seen = pairs_of_rows(), []
    rows = rows.replace(advantages=jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None], (B, L)))

    def spy(scores, batch):
        weights = preference.pair_weights(batch)
        note = lambda w, row: seen.append((np.asarray(w), np.asarray(row)))
        jax.debug.callback(note, weights, batch.advantages[:, 0])
        return jnp.sum(weights) + 0.0 * jnp.sum(scores.log_probs), {}

    run(rows, losses=(spy,), minibatches=minibatches, unit_rows=unit_rows, epochs=epochs)
    jax.effects_barrier()
    return [(int(row[i]), int(row[j])) for w, row in seen for i, j in zip(*np.nonzero(w))]


def test_every_pair_is_seen_however_many_minibatches():
    whole = seen_pairs(1, 2)
    assert sorted(whole) == [(0, 1), (4, 5), (7, 6)]  # row 3 has no action: its pair is none
    seen = seen_pairs(4, 2, epochs=4)
    epochs = [seen[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(epoch) == sorted(whole) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # and the pairs are shuffled
    assert len(seen_pairs(4, 1)) < len(whole)  # what happens to rows that are shuffled one by one


slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # pieces of each loss add up in invariances_test, too


@pytest.mark.parametrize("loss", [preference.dpo, slow(reward_models.bradley_terry), slow(reward_models.plackett_luce)])
def test_micro_batches_of_whole_groups_only_add_up(loss):
    model = Transformer(dataclasses.replace(MODEL.config, value_head=True))
    first = initialize(model, jax.random.key(0))

    def gradient(micro_batch_rows):
        rows = pairs_of_rows()
        rows = rows.replace(weights=reductions.sequence_mean_token_mean(rows.mask),
                            token_weights=reductions.token_mean(rows.mask))  # fmt: skip
        call = functools.partial(updates.gradients, score_fn=functools.partial(score, model), losses=(loss,),
                                 micro_batch_rows=micro_batch_rows)  # fmt: skip
        return jax.jit(call)(first, rows)

    (whole, metrics), (split, split_metrics) = gradient(0), gradient(4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole)) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, split)
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_row_alone_is_shuffled_as_ever():
    """Units of one row: the order is jax.random.permutation(key, rows), so that old runs can be repeated."""
    seen = []

    def spy(scores, batch):
        jax.debug.callback(lambda row: seen.append(np.asarray(row)), batch.advantages[:, 0], ordered=True)
        return 0.0 * jnp.sum(scores.log_probs), {}

    rows = batch()
    rows = rows.replace(advantages=jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None], (B, L)))
    run(rows, losses=(spy,), minibatches=4)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.concatenate(seen), jax.random.permutation(jax.random.key(2), B))


def test_groups_that_would_be_split_are_refused():
    with pytest.raises(Refused, match="a minibatch of 2 rows does not hold whole groups"):
        run(batch(), minibatches=4, unit_rows=4)
    with pytest.raises(Refused, match="compares the 2 rows of a group, and a micro-batch of 1 rows"):
        run(batch(), minibatches=2, micro_batch_rows=1, unit_rows=2)


def test_an_array_is_computed_alone():
    def draw():
        other = jax.pure_callback(lambda: 1 / 0, jax.ShapeDtypeStruct((), jnp.float32))  # fails if it is computed
        return jnp.arange(6) // jnp.asarray(np.asarray([2] * 6)), other

    assert updates.computed_alone(lambda: draw()[0]).tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(Refused, match="8 rows do not divide into minibatches = 3: take 1, 2, 4 or 8"):
        run(batch(), minibatches=3)
    with pytest.raises(Refused, match="4 rows does not divide into micro_batch_rows = 3"):
        run(batch(), minibatches=2, micro_batch_rows=3)
