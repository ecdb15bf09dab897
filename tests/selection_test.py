"""Selections by hand: they read the unshaped outcome, scored rows only, and leave ties to the earlier row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewarded_rows import build

from mlrl import divergences, selection

with_ = functools.partial
MASK = [[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 1]]


def example(**kw):
    """Two groups of three; the shaped rewards differ everywhere, the outcomes of the second group do not."""
    kw = {"outcome": [0.0, 1.0, 1.0, 1.0, 1.0, np.nan], "scored": [True] * 5 + [False]} | kw
    return build(MASK, [0.1, 0.9, 0.7, 0.3, 0.2, np.nan], group=[0, 0, 0, 3, 3, 3], **kw)


CASES = {
    "keep_all": (selection.keep_all, [1, 1, 1, 1, 1, 0]),
    "with_spread": (selection.with_spread, [1, 1, 1, 0, 0, 0]),
    "not_truncated": (selection.not_truncated, [1, 0, 1, 1, 1, 0]),
    "at_most": (with_(selection.at_most, limit_tokens=1), [0, 1, 0, 0, 1, 0]),
    "keep_role": (with_(selection.keep_role, role=1), [0, 0, 1, 0, 0, 0]),
    "keep_roles": (with_(selection.keep_roles, roles=(1, 2)), [0, 0, 1, 0, 0, 0]),
    "keep_correct": (selection.keep_correct, [0, 1, 1, 1, 1, 0]),
    "best_of_n": (selection.best_of_n, [0, 1, 0, 1, 0, 0]),
    "best_two": (with_(selection.best_of_n, keep=2), [0, 1, 1, 1, 1, 0]),
    "best_and_worst": (selection.best_and_worst, [1, 1, 0, 0, 0, 0]),
    "all_of": (
        with_(selection.all_of, select_fns=(selection.keep_correct, selection.not_truncated)),
        [0, 0, 1, 1, 1, 0],
    ),
}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_by_hand(name, wrap):
    fn, expected = CASES[name]
    batch = example(truncated=[False, True, False, False, False, False], role=[0, 0, 1, 0, 0, 1])
    assert wrap(fn)(batch).astype(int).tolist() == expected


def test_a_role_comes_along_with_what_is_kept_of_the_others():
    """The greedy rows (role 1) are the best of group 0 and of group 4, and still in no pair; group 4 has no spread."""
    batch = build([[0, 1]] * 8, [0] * 8, outcome=[0.5, 0, 0.2, 1, 0.3, 0.3, 0.3, 1], group=[0] * 4 + [4] * 4,
                  role=[0, 0, 0, 1] * 2, scored=[True] * 8)  # fmt: skip
    assert selection.with_role(batch).astype(int).tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    best = with_(selection.with_role, select_fn=selection.best_of_n)
    assert jax.jit(best)(batch).astype(int).tolist() == [1, 0, 0, 1, 1, 0, 0, 1]
    unscored = batch.replace(rewards=batch.rewards.replace(scored=batch.rewards.scored.at[3].set(False)))
    assert selection.with_role(unscored).astype(int).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_spread_looks_at_the_outcome_and_not_at_the_shaped_reward():
    assert selection.with_spread(example(outcome=[1.0] * 6)).tolist() == [False] * 6
    nearly = [1.0, 1.0 + 1e-7, 1.0, 0.0, 1.0, 0.0]
    assert selection.with_spread(example(outcome=nearly)).tolist() == [False] * 3 + [True, True, False]


def test_stale_rows_are_rejected():
    batch = build([[0, 1, 1]] * 2, [0, 0], group=[0, 1], old_log_probs=[[0, -1, -1], [0, -1, -3]])
    behavior = jnp.array([[jnp.nan, -1.0, -1.1], [jnp.nan, -1.0, -1.0]])
    batch = batch.replace(rollout=batch.rollout.replace(behavior_log_probs=behavior))
    keep = selection.accept(batch, estimator=divergences.k1, limit=0.5)
    assert keep.tolist() == [True, False]


def test_balance_score_by_hand():
    # group 0: three selected, two right: min(2/4, 1) * 2/3; group 3: one selected, right: 1/4 * 1; group 5: none
    outcome = jnp.array([1.0, 1, 0, 1, 1, 1])
    selected = jnp.array([1, 1, 1, 1, 0, 0], bool)
    group = jnp.array([0, 0, 0, 3, 3, 5])
    assert float(selection.balance_score(outcome, selected, group, target=4.0)) == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert float(selection.balance_score(outcome, jnp.zeros(6, bool), group)) == 0.0


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_above_keeps_the_best_different_completions_by_hand(wrap):
    # group 0: 0.9, the same again, 0.5, 0.7, one below the threshold; group 5: one unscored, the same scored, one at it
    said = [[0, 1, 1], [0, 1, 1], [0, 2, 1], [0, 3, 1], [0, 4, 1], [0, 1, 1], [0, 1, 1], [0, 9, 1]]
    batch = build([[0, 1, 1]] * 8, [0.9, 0.9, 0.5, 0.7, 0.1, np.nan, 0.6, 0.2], group=[0] * 5 + [5] * 3,
                  outcome=[0.0] * 8, scored=[True] * 5 + [False, True, True])  # fmt: skip
    batch = batch.replace(rollout=batch.rollout.replace(tokens=jnp.array(said)))
    kept = lambda **knobs: wrap(with_(selection.above, **knobs))(batch).astype(int).tolist()  # noqa: E731
    assert kept(threshold=0.2, keep=2) == [1, 0, 0, 1, 0, 0, 1, 0]
    assert kept(threshold=0.2, keep=9) == [1, 0, 1, 1, 0, 0, 1, 0]
    assert kept(threshold=jnp.float32(0.8)) == [1, 0, 0, 0, 0, 0, 0, 0]


def test_overlong_penalty_by_hand():
    lengths = jnp.array([10, 16, 18, 20, 25])
    found = selection.overlong_penalty(lengths, limit_tokens=20, buffer_tokens=4)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])
