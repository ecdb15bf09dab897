"""Statistics within groups: by hand, partial groups, unscored rows, singletons, order, tolerance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import groups

SCORES = jnp.array([6.0, 9.0, 3.0, 12.0, 1.0])
GROUP = jnp.array([0, 2, 0, 2, 4])
SCORED = jnp.ones(5, bool)
RLOO = dict(baseline=groups.leave_one_out_mean, scale=groups.no_scale, eps=0.0)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_rloo_by_hand(wrap):
    run = wrap(lambda s: groups.group_relative(s, GROUP, SCORED, **RLOO))
    np.testing.assert_allclose(run(SCORES), [3, -3, -3, 3, 0])


def test_leave_one_out_is_the_group_mean_difference_stretched():
    scores = jnp.array([1.0, 4.0, 2.5, -3.0])
    one = (jnp.zeros(4, int), jnp.ones(4, bool))
    centred = groups.group_relative(scores, *one, scale=groups.no_scale, eps=0.0)
    np.testing.assert_allclose(groups.group_relative(scores, *one, **RLOO), centred * 4 / 3, rtol=1e-6)


def test_order_of_rows_does_not_matter():
    order = jnp.array([4, 2, 0, 3, 1])
    for kw in ({}, RLOO, dict(baseline=groups.batch_mean, scale=groups.batch_std)):
        straight = groups.group_relative(SCORES, GROUP, SCORED, **kw)
        np.testing.assert_allclose(groups.group_relative(SCORES[order], GROUP[order], SCORED[order], **kw),
                                   straight[order], rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("scale", [groups.group_std, groups.batch_std, groups.leave_one_out_std, groups.no_scale])
@pytest.mark.parametrize("baseline", [groups.group_mean, groups.batch_mean, groups.leave_one_out_mean])
def test_an_unscored_row_leaves_every_statistic(baseline, scale):
    kw = dict(baseline=baseline, scale=scale, alone=groups.alone_as_computed)
    with_nan = groups.group_relative(
        jnp.append(SCORES, jnp.nan), jnp.append(GROUP, 0), jnp.append(SCORED, False), **kw
    )
    np.testing.assert_allclose(with_nan[:5], groups.group_relative(SCORES, GROUP, SCORED, **kw), rtol=1e-6)
    assert with_nan[5] == 0.0


def test_the_rule_for_a_row_alone_is_explicit():
    run = lambda alone: float(groups.group_relative(SCORES, GROUP, SCORED, alone=alone)[4])
    assert run(groups.alone_zero) == 0.0
    assert run(groups.alone_score) == 1.0
    kw = dict(scale=groups.no_scale, eps=0.0, alone=groups.alone_as_computed)
    batch = groups.group_relative(SCORES, GROUP, SCORED, baseline=groups.batch_mean, **kw)
    np.testing.assert_allclose(batch, SCORES - 6.2, rtol=1e-6)


def test_equal_rewards_that_went_through_sums_give_exactly_zero():
    scores = jnp.full(7, 0.1) + jnp.array([0, 1, 0, 1, 0, 1, 0]) * 1e-8
    group = jnp.zeros(7, int)
    assert bool(groups.zero_spread(scores, group, jnp.ones(7, bool)).all())
    np.testing.assert_array_equal(groups.group_relative(scores, group, jnp.ones(7, bool), eps=0.0), np.zeros(7))


def test_zero_spread_looks_at_scored_rows_of_the_group_only():
    scores = jnp.array([1.0, 1.0, 5.0, 0.0, 1.0, jnp.nan])
    group = jnp.array([0, 0, 0, 3, 3, 5])
    scored = jnp.array([1, 1, 0, 1, 1, 0], bool)
    np.testing.assert_array_equal(groups.zero_spread(scores, group, scored), [1, 1, 1, 0, 0, 1])


def test_leave_one_out_std_is_the_std_of_the_others():
    scores = np.random.default_rng(0).normal(size=6).astype(np.float32) + 100
    found = groups.leave_one_out_std(scores, jnp.zeros(6, int), jnp.ones(6, bool), ddof=1)
    np.testing.assert_allclose(found, [np.delete(scores, i).std(ddof=1) for i in range(6)], rtol=1e-4)


def test_ranks_fall_with_the_score_and_ties_go_to_the_earlier_row():
    scores = jnp.array([1.0, 3.0, 3.0, jnp.nan, 0.0, 2.0])
    group = jnp.array([5, 2, 2, 2, 5, 2])
    scored = jnp.array([1, 1, 1, 0, 1, 1], bool)
    np.testing.assert_array_equal(groups.rank(scores, group, scored), [0, 0, 1, 3, 1, 2])


def test_win_rate_of_a_transitive_and_of_a_cyclic_judge():
    wins = jnp.array([[0, 1, 1, 9], [0, 0, 1, 9], [0, 0, 0, 9], [9, 9, 9, 9.0]])
    group, scored = jnp.array([0, 0, 0, 3]), jnp.ones(4, bool)
    np.testing.assert_allclose(groups.win_rate(wins, group, scored), [1, 0.5, 0, 0.5])
    rock = jnp.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
    np.testing.assert_allclose(groups.win_rate(rock, jnp.zeros(3, int), jnp.ones(3, bool)), [0.5] * 3)


def test_the_first_of_equal_rows_of_a_group_by_hand():
    rows = jnp.array([[3, -1], [3, -1], [3, 3], [3, -1], [3, -1], [5, 5], [3, 3]])
    group, scored = jnp.array([4, 0, 0, 0, 4, 4, 0]), jnp.array([1, 0, 1, 1, 1, 0, 1], bool)
    assert groups.first_of_equals(rows, group, scored).astype(int).tolist() == [1, 0, 1, 1, 0, 0, 0]


def test_many_rows_are_told_apart_as_numpy_does():
    rows = np.random.default_rng(0).integers(0, 3, (300, 4))
    group = np.arange(300) % 2
    found = np.asarray(groups.first_of_equals(jnp.asarray(rows), jnp.asarray(group), jnp.ones(300, bool)))
    _, first = np.unique(np.column_stack([group, rows]), axis=0, return_index=True)
    assert sorted(np.flatnonzero(found)) == sorted(first)
