"""Advantage functions: what each library means by GRPO, to the printed digits; and every other method by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewarded_rows import build

from mlrl import advantages, divergences, groups, reductions
from mlrl.losses import policy
from mlrl.types import Refused, Scores

with_ = functools.partial


MASK = [[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]]
ONE_OF_FOUR = build(MASK, [1, 0, 0, 0], group=[0] * 4)

GRPO_OF = {  # rewards [1, 0, 0, 0]: the first row's advantage and the others', as correctness is stated per library
    "trl": (with_(advantages.grpo, eps=1e-4), 1.4997, -0.4999, 4),
    "verl": (with_(advantages.grpo, alone=groups.alone_score), 1.499997, -0.499999, 6),
    "skyrl": (advantages.grpo, 1.499997, -0.499999, 6),
    "open_instruct": (with_(advantages.grpo, ddof=0, eps=1e-8), 1.732, -0.577, 3),
    "nemo_rl": (
        with_(advantages.grpo, baseline=groups.leave_one_out_mean, scale=groups.leave_one_out_std),
        1.0, -0.577, 3,
    ),
    "dr_grpo": (with_(advantages.grpo, scale=groups.no_scale, eps=0.0), 0.75, -0.25, 7),
    "maxrl": (with_(advantages.maxrl, eps=0.0), 3.0, -1.0, 6),
}  # fmt: skip


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
@pytest.mark.parametrize("name", GRPO_OF)
def test_what_each_library_means_by_grpo(name, wrap):
    fn, first, rest, digits = GRPO_OF[name]
    found, returns = wrap(fn)(ONE_OF_FOUR)
    assert round(float(found[0, 1]), digits) == pytest.approx(first, abs=1e-7)
    for row, column in [(1, 1), (2, 1), (3, 2)]:
        assert round(float(found[row, column]), digits) == pytest.approx(rest, abs=1e-7)
    np.testing.assert_array_equal(found[~np.array(MASK, bool)], np.zeros(5))
    np.testing.assert_array_equal(returns, [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_the_singleton_rules():
    alone = build(MASK, [2, 0, 1, 1], group=[3, 0, 0, 0])
    assert float(advantages.grpo(alone)[0][0, 1]) == 0.0
    assert float(advantages.grpo(alone, alone=groups.alone_score)[0][0, 1]) == 2.0
    assert float(advantages.rloo(alone)[0][0, 1]) == 0.0


def test_rloo_by_hand():
    batch = build([[1]] * 5, [6, 9, 3, 12, 1], group=[0, 2, 0, 2, 4])
    np.testing.assert_allclose(advantages.rloo(batch)[0][:, 0], [3, -3, -3, 3, 0])


FUNCTIONS = {
    "grpo": advantages.grpo,
    "rloo": advantages.rloo,
    "spo": advantages.spo,
    "opo": advantages.opo,
    "maxrl": advantages.maxrl,
    "gdpo": with_(advantages.gdpo, weights={"right": 1.0, "short": 0.5}),
    "remax": advantages.remax,
    "role_relative": advantages.role_relative,
    "task_relative": advantages.task_relative,
    "reinforce": with_(advantages.reinforce, discount=0.9),
    "reinforce_pp": with_(advantages.reinforce_pp, discount=0.9),
    "reinforce_pp_baseline": advantages.reinforce_pp_baseline,
    "gae": with_(advantages.gae, discount=0.9, value_lambda=1.0, bootstrap=advantages.last_value),
    "length_adaptive_gae": with_(advantages.length_adaptive_gae, alpha=0.8),
    "macro_gae": with_(advantages.macro_gae, termination=with_(advantages.fixed_chunks, tokens=2)),
    "random_macro_gae": with_(advantages.macro_gae, termination=with_(advantages.random_chunks, lengths=(1, 2, 3))),
    "perplexity_gae": with_(advantages.macro_gae, termination=advantages.rising_perplexity),
    "turn_gae": with_(advantages.macro_gae, termination=advantages.turns),
    "turn_level": advantages.turn_level,
    "attempts": with_(advantages.attempts, weights=(0.5, 1.0), bonus=2.0),
    "step_level": advantages.step_level,
    "trajectory_balance": with_(advantages.trajectory_balance, kl_coef=0.5),
    "kto": advantages.kto,
    "without_outliers": with_(advantages.without_outliers, advantage_fn=advantages.grpo),
    "kl_in_reward": with_(advantages.kl_in_reward, advantage_fn=advantages.reinforce, kl_coef=0.1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_order_padding_and_unscored_rows_change_nothing(name):
    """Six rows; then the same rows shuffled, with padding columns and an unscored NaN row thrown in."""
    rng = np.random.default_rng(0)
    mask = np.array([list(row) for row in ("11011", "11100", "10010", "10000", "11111", "11010")]).astype(int)
    turn = np.array([[0, 0, 1, 1, 1]] * 6)
    arrays = {n: rng.normal(size=(6, 5)) for n in ("old_log_probs", "reference_log_probs", "values")}
    tokens = rng.normal(size=(6, 5)).round(1)
    group, role = np.array([0, 0, 0, 3, 3, 3]), np.array([0, 0, 1, 1, 0, 0])
    parts = {"right": rng.integers(0, 2, 6), "short": rng.random(6)}
    truncated = np.array([0, 1, 0, 0, 1, 0], bool)
    valid = np.ones((6, 5), bool)
    rows = dict(turn=turn, role=role, truncated=truncated, valid=valid)
    batch = build(mask, tokens, group=group, parts=parts, **rows, **arrays)

    order = [4, 2, 0, 5, 1, 3]
    grow = lambda x: np.pad(np.asarray(x)[order], ((0, 1), (1, 2)))
    append = lambda x, v: np.append(np.asarray(x)[order], v)
    big = build(
        np.concatenate([grow(mask)[:6], np.ones((1, 8), int)]),
        np.concatenate([grow(tokens)[:6], np.full((1, 8), np.nan)]),
        group=append(group, 0), parts={k: append(v, np.nan) for k, v in parts.items()},
        turn=np.pad(grow(turn)[:6], ((0, 1), (0, 0))), role=append(role, 5), truncated=append(truncated, True),
        scored=[True] * 6 + [False], valid=np.concatenate([grow(valid)[:6], np.ones((1, 8), bool)]),
        **{k: grow(v) for k, v in arrays.items()},
    )  # fmt: skip
    for small, large in zip(jax.jit(FUNCTIONS[name])(batch), jax.jit(FUNCTIONS[name])(big)):
        assert np.abs(small).max() > 0
        np.testing.assert_allclose(large[:6, 1:6], np.asarray(small)[order], rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(small[~mask.astype(bool)], np.zeros((~mask.astype(bool)).sum()))
        assert not np.asarray(large[6]).any() and np.isfinite(large).all()


def test_opo_weighs_the_baseline_by_length():
    # lengths 2, 1, 2, 2 and scores 1, 0, 0, 0: the baseline is 2 / 7
    found = advantages.opo(ONE_OF_FOUR)[0]
    np.testing.assert_allclose(found[:, 1], [5 / 7, -2 / 7, -2 / 7, -2 / 7], rtol=1e-6)


def test_maxrl_is_zero_where_nothing_was_right():
    np.testing.assert_array_equal(advantages.maxrl(build(MASK, [0, 0, 0, 0], group=[0] * 4))[0], np.zeros((4, 3)))


def test_gdpo_standardizes_each_part_apart():
    parts = {"right": [1.0, 0, 1, 0], "big": [100.0, 0, 0, 100]}
    batch = build([[1]] * 4, [0, 0, 0, 0], group=[0] * 4, parts=parts)
    found = advantages.gdpo(batch, weights={"right": 1.0, "big": 1.0})[0][:, 0]
    np.testing.assert_allclose(found, np.array([1, -1, 0, 0]) * np.sqrt(1.5), atol=2e-4)  # eps weighs on parts apart
    with pytest.raises(Refused, match="names the reward part 'style', but the parts are big, right"):
        advantages.gdpo(batch, weights={"style": 1.0})


def test_remax_subtracts_the_greedy_row():
    batch = build(MASK, [1, 0, 3, 2], group=[0, 0, 0, 3], role=[0, 0, 1, 0])
    found = advantages.remax(batch)[0]
    np.testing.assert_array_equal(found, [[0, -2, -2], [0, -3, 0], [0, 0, 0], [0, 0, 0]])


def test_spo_counts_wins_in_the_group():
    batch = build([[1]] * 5, [3, 1, 1, 9, 0], group=[0, 0, 0, 3, 3])  # wins 1, 1/4, 1/4 of two duels; 1 and 0 of one
    np.testing.assert_allclose(advantages.spo(batch)[0][:, 0], [0.5, -0.25, -0.25, 0.5, -0.5], rtol=1e-6)
    rock_paper_scissors = lambda b: jnp.pad(jnp.array([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]]), (0, 2))
    found = advantages.spo(batch, preference_fn=rock_paper_scissors)[0]
    np.testing.assert_allclose(found[:3], np.zeros((3, 1)), atol=1e-7)  # no word is best, whatever the scores say


def test_role_relative_standardizes_by_role():
    batch = build([[1]] * 4, [1, 10, 3, 30], group=[0, 0, 2, 2], role=[0, 7, 0, 7])
    expected = np.array([-1, -1, 1, 1]) / np.sqrt(2)
    np.testing.assert_allclose(advantages.role_relative(batch)[0][:, 0], expected, rtol=1e-5)


def test_task_relative_whitens_each_role_over_its_tokens():
    """Role 3: three actions of score 1 and one of score 5, mean 2 and variance 3. Role 0 has one score only."""
    mask = [[1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1]]
    batch = build(mask, [1, 5, 7, 7, 99], group=[0, 0, 2, 3, 4], role=[3, 3, 0, 0, 3], scored=[True] * 4 + [False])
    found, _ = advantages.task_relative(batch)
    expected = np.array([-1 / np.sqrt(3), 3 / np.sqrt(3), 0, 0, 0])
    np.testing.assert_allclose(found, np.where(batch.mask, expected[:, None], 0.0), rtol=1e-5)


def test_role_conditioned_baselines_remember():
    fn = advantages.role_conditioned(roles=2, decay=0.5)
    batch = build([[1]] * 4, [1, 3, 4, 8], group=[0, 0, 2, 2], role=[0, 0, 1, 0], scored=[True, True, True, False])
    (first, _), state = jax.jit(fn.update)(fn.init(), batch)
    np.testing.assert_allclose(first[:, 0], [1, 3, 4, 0])  # the old baseline is 0, the last row is not scored
    np.testing.assert_allclose(state, [1.5, 2])  # half of 4; two rows of mean 2 keep a quarter
    (second, _), _ = fn.update(state, batch)
    np.testing.assert_allclose(second[:, 0], [-0.5, 1.5, 2, 0])
    shared = advantages.role_conditioned(roles=1, decay=0.5, role_fn=advantages.one_role)
    _, state = shared.update(shared.init(), batch)
    np.testing.assert_allclose(state, [7 / 8 * 8 / 3])  # three rows of mean 8/3 keep an eighth
    for wrong in (dict(roles=0), dict(decay=1.0)):
        with pytest.raises(Refused, match="role_conditioned"):
            advantages.role_conditioned(**wrong)


REWARDED = build([[0, 1, 0, 1]], [[0.0, 1, 0, 2]], group=[0], values=[[0, 0.5, 0, 1.0]], truncated=[True])


def test_reinforce_counts_actions():
    np.testing.assert_allclose(advantages.reinforce(REWARDED, discount=0.5)[0], [[0, 2, 0, 2]])


def test_gae_bootstraps_by_choice_and_takes_two_lambdas():
    gae = lambda **kw: [x[0].tolist() for x in advantages.gae(REWARDED, discount=0.5, gae_lambda=0.0, **kw)]
    none, last = advantages.no_bootstrap, advantages.last_value
    assert gae(value_lambda=0.0, bootstrap=none) == [[0, 1.0, 0, 1.0], [0, 1.5, 0, 2.0]]
    assert gae(value_lambda=0.0, bootstrap=last) == [[0, 1.0, 0, 1.5], [0, 1.5, 0, 2.5]]
    assert gae(value_lambda=1.0, bootstrap=none) == [[0, 1.0, 0, 1.0], [0, 2.0, 0, 2.0]]


def test_turn_level_compares_the_same_turn_of_the_group():
    mask = [[1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]]
    turn = [[0, 0, 1, 1]] * 3
    rewards = [[1.0, 0, 0, 2.0], [0.0, 0, 1.0, 0], [4.0, 0, 0, 0]]
    batch = build(mask, rewards, group=[0, 0, 0], turn=turn)
    found, returns = advantages.turn_level(batch, scale=groups.no_scale, eps=0.0)
    np.testing.assert_allclose(returns, [[3, 0, 2, 2], [1, 0, 1, 0], [4, 0, 0, 0]])
    third = 8 / 3
    np.testing.assert_allclose(
        found, [[3 - third, 0, 0.5, 0.5], [1 - third, 0, -0.5, 0], [4 - third, 0, 0, 0]], rtol=1e-5
    )


def test_step_level_standardizes_all_steps_of_the_group_and_sums_to_go():
    batch = build([[1, 1], [1, 1]], [[1.0, 0.0], [1.0, 1.0]], group=[0, 0], turn=[[0, 1], [0, 1]])
    z = (np.array([1, 0, 1, 1]) - 0.75) / (0.5 + 1e-6)
    np.testing.assert_allclose(advantages.step_level(batch)[0], [[z[0] + z[1], z[1]], [z[2] + z[3], z[3]]], rtol=1e-5)


def test_macro_gae_with_turns_is_turn_level_gae():
    batch = build([[1, 1, 0, 1]], [[0.0, 1, 0, 2]], group=[0], values=[[0.2, 0.4, 0, 1.0]], turn=[[0, 0, 1, 1]])
    found, returns = advantages.macro_gae(batch, termination=advantages.turns, gae_lambda=0.5)
    np.testing.assert_allclose(returns, [[2.5, 2.5, 0, 2.0]], rtol=1e-6)  # delta 1 + 1 - 0.3, A = 1.7 + 0.5 * 1
    np.testing.assert_allclose(found, [[2.2, 2.2, 0, 1.0]], rtol=1e-6)


def test_whitening_by_hand():
    mask = jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    x = jnp.where(mask, jnp.array([[1.0, 2, 9], [6.0, 9, 9]]), jnp.nan)
    std = np.std([1, 2, 6], ddof=1)
    np.testing.assert_allclose(advantages.whiten(x, mask), np.array([[-2, -1, 0], [3, 0, 0]]) / std, rtol=1e-5)
    np.testing.assert_allclose(advantages.whiten(x, mask, centre=False)[0, 1], 2 / std, rtol=1e-5)
    population = np.std([1, 2, 6])
    np.testing.assert_allclose(advantages.whiten(x, mask, ddof=0)[1, 0], 3 / population, rtol=1e-5)
    np.testing.assert_array_equal(advantages.whiten(x, jnp.zeros_like(mask)), np.zeros((2, 3)))


def test_outliers_learn_nothing():
    batch = build([[1]] * 20, [100.0] + [0.0, 1.0] * 9 + [1.0], group=list(range(20)))
    found = advantages.without_outliers(batch, advantage_fn=advantages.reinforce)[0][:, 0]
    assert float(found[0]) == 0.0 and float(jnp.abs(found[1:]).min()) > 0.0


def test_kl_in_the_reward_by_hand_and_off():
    batch = build([[0, 1, 1]], [2.0], group=[0], old_log_probs=[[0, -1, -2.0]], reference_log_probs=[[0, -1.5, -1]])
    fn = with_(advantages.kl_in_reward, advantage_fn=advantages.reinforce)
    np.testing.assert_allclose(fn(batch, kl_coef=0.1)[0], [[0, 2 - 0.05 + 0.1, 2 + 0.1]], rtol=1e-6)
    squared = fn(batch, kl_coef=0.1, estimator=divergences.k2)[0]
    np.testing.assert_allclose(squared, [[0, 2 - 0.0125 - 0.05, 2 - 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(fn(batch, kl_coef=0.0)[0], advantages.reinforce(batch)[0])


def test_trajectory_balance_vanishes_at_its_optimum():
    """The policy proportional to reference * exp(score / kl_coef) has no residual; elsewhere A is minus it."""
    scores, kl_coef = np.array([0.0, 1.0, 3.0], np.float32), 0.5
    reference = jax.nn.log_softmax(jnp.array([0.2, -0.4, 0.1]))
    optimum = jax.nn.log_softmax(reference + scores / kl_coef)
    make = lambda lp: build([[1]] * 3, scores, group=[0] * 3, old_log_probs=lp[:, None],
                            reference_log_probs=reference[:, None])  # fmt: skip
    tb = with_(advantages.trajectory_balance, kl_coef=kl_coef)
    np.testing.assert_allclose(tb(make(optimum))[0], np.zeros((3, 1)), atol=1e-5)
    residual = -scores / kl_coef
    np.testing.assert_allclose(tb(make(reference))[0][:, 0], residual.mean() - residual, rtol=1e-5)


def test_trajectory_balance_learns_the_tempered_reference():
    """A bandit of four arms, every arm in the group once: gradient steps reach the closed form."""
    scores = np.array([0.0, 1.0, 2.0, 0.5], np.float32)
    reference = jax.nn.log_softmax(jnp.array([0.0, 0.5, -0.5, 0.3]))
    template = build([[1]] * 4, scores, group=[0] * 4, old_log_probs=np.zeros((4, 1)),
                     reference_log_probs=reference[:, None])  # fmt: skip
    template = template.replace(weights=reductions.sequence_mean_token_mean(template.mask))

    def step(logits, _):
        lp = jax.nn.log_softmax(logits)[:, None]
        batch = template.replace(old_log_probs=jax.lax.stop_gradient(lp))
        batch = batch.replace(advantages=advantages.trajectory_balance(batch)[0])
        loss = lambda z: policy.trajectory_balance(
            Scores(log_probs=jax.nn.log_softmax(z)[:, None], entropy=lp, values=lp), batch
        )[0]
        return logits - jax.grad(loss)(logits), None

    logits, _ = jax.lax.scan(step, jnp.zeros(4), length=300)
    np.testing.assert_allclose(jax.nn.softmax(logits), jax.nn.softmax(reference + scores), atol=1e-4)


@pytest.mark.parametrize("rewards, scores", [((0, 1), (0, 11)), ((1, 1), (1, 1)), ((1, 0), (1, -10)), ((0, 0), (0, 0))])
def test_scores_of_attempts_with_a_bonus(rewards, scores):
    found = advantages.attempt_scores(jnp.asarray([rewards], jnp.float32), bonus=10.0)
    np.testing.assert_allclose(found, [scores])


def test_attempts_by_hand():
    """Four rows, each with an attempt of two tokens, an observation, and one of one token, in one group."""
    mask, turn = [[1, 1, 0, 1]] * 4, [[0, 0, 1, 1]] * 4
    rewards = [[0, r1, 0, r2] for r1, r2 in ((0, 1), (1, 1), (1, 0), (0, 0))]
    batch = build(mask, rewards, group=[2] * 4, turn=turn, valid=np.ones((4, 4), bool))
    found, returns = jax.jit(with_(advantages.attempts, bonus=10.0))(batch)
    first, second = np.array([0, 1, 1, 0]), np.array([11, 1, -10, 0])
    np.testing.assert_allclose(returns, np.stack([first, first, 0 * first, second], axis=1), atol=1e-6)
    np.testing.assert_allclose(found[:, 0], first - 0.5)  # no bonus, and nothing of what the second attempt earned
    np.testing.assert_allclose(found[:, 3], second - 0.5, rtol=1e-6)
    stage_one, _ = advantages.attempts(batch, weights=(0.0, 1.0))
    np.testing.assert_allclose(stage_one[:, 0], np.zeros(4))
    np.testing.assert_allclose(stage_one[:, 3], [0.5, 0.5, -0.5, -0.5])
    own = advantages.turn_level(batch, discount=0.0, scale=groups.no_scale, eps=0.0)  # the same, without a bonus
    np.testing.assert_allclose(advantages.attempts(batch)[0], own[0], atol=1e-6)
    with pytest.raises(Refused, match="weights is empty"):
        advantages.attempts(batch, weights=())
