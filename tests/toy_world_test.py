"""A language of four words, each a whole completion, where every objective's optimum is known in closed form.

The policy is a table of logits. Expectations are exact: every word is a row, weighted by how likely it is under the
policy (or by how often the data holds it), so that nothing is sampled and gradient steps reach the optimum itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import advantages, batches, divergences, groups, updates
from mlrl.losses import distillation, policy, preference, regularizers, supervised, values
from mlrl.types import Rewards, Rollout, Scores

with_ = functools.partial
REWARD = np.array([0.0, 1.0, 0.4, -0.5], np.float32)
REFERENCE = np.array([0.4, 0.1, 0.2, 0.3], np.float32)
CENTRED = REWARD - REWARD.mean()
STANDARD = CENTRED / (REWARD.std(ddof=1) + 1e-6)
BETA = 0.5
TOLERANCE = 1e-3  # of a probability


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def tilted(scores, beta=BETA):
    """What maximizes the mean score less beta * KL(policy || reference): reference * exp(score / beta)."""
    return softmax(np.log(REFERENCE) + scores / beta)


def forward_tilted(scores, beta=BETA):
    """What maximizes the mean score less beta * KL(reference || policy): beta * reference / (level - score)."""
    low, high = scores.max(), scores.max() + 10.0
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (beta * REFERENCE / (level - scores)).sum() > 1 else (low, level)
    return beta * REFERENCE / (level - scores)


def rows_of(words, group, reward):
    """A batch with one token a row; what depends on the policy is filled in at every step."""
    n = len(words)
    column = lambda x: jnp.asarray(x, jnp.float32)[:, None]
    ones, zeros = jnp.ones((n, 1), bool), jnp.zeros((n,), jnp.int32)
    rollout = Rollout(
        tokens=jnp.asarray(words, jnp.int32)[:, None], valid=ones, action_mask=ones, behavior_log_probs=column(zeros),
        turn=jnp.zeros((n, 1), jnp.int32), role=zeros, group=jnp.asarray(group, jnp.int32), truncated=zeros > 0,
        policy_version=zeros,
    )  # fmt: skip
    rewards = Rewards(column(reward), jnp.asarray(reward, jnp.float32), zeros == 0, {})
    reference = np.log(REFERENCE)[np.asarray(words)]
    return batches.unannotated(rollout, rewards).replace(
        reference_log_probs=column(reference), token_weights=jnp.full((n, 1), 1.0 / n)
    )


EVERY_WORD = rows_of(range(4), [0] * 4, REWARD)


def scores_of(parameters, batch):
    """What the policy says of the batch's words; a parameter more than four is the value of the prompt."""
    log_probs = jax.nn.log_softmax(parameters[:4])
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs)
    fill = lambda x: jnp.full(batch.mask.shape, x)
    return Scores(log_probs[batch.rollout.tokens[:, 0]][:, None], fill(entropy), fill(parameters[-1]))


def learned(losses, advantage_fn=advantages.grpo, *, batch=EVERY_WORD, weight_of=jnp.exp, steps=3000, rate=1.0,
            inner=1, start=(0.0,) * 4):  # fmt: skip
    """The probabilities that gradient descent ends with, `inner` steps on each batch.

    A row weighs weight_of(its log-prob under the old policy) [B,1]: by default its probability.
    """

    def step(parameters, _):
        now = scores_of(parameters, batch)
        rows = batch.replace(old_log_probs=now.log_probs, values=now.values, weights=weight_of(now.log_probs))
        credit, returns = advantage_fn(rows)
        rows = jax.lax.stop_gradient(rows.replace(advantages=credit, returns=returns))
        loss = lambda p: updates.total_loss(losses, scores_of(p, rows), rows)[0]
        for _ in range(inner):
            parameters = parameters - rate * jax.grad(loss)(parameters)
        return parameters, None

    run = jax.jit(lambda p: jax.lax.scan(step, p, length=steps)[0])
    return np.asarray(jax.nn.softmax(run(jnp.array(start))[:4]))


def data_weights(weights):
    """Rows that weigh what the data says, whatever the policy is."""
    fixed = jnp.asarray(weights, jnp.float32)[:, None]
    return lambda log_probs: fixed


def assert_near(found, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(found, expected, atol=tolerance)


ARGMAX = {
    "reinforce": ((policy.reinforce,), advantages.reinforce, {}),
    "rloo": ((policy.reinforce,), advantages.rloo, {}),
    "opo": ((policy.reinforce,), advantages.opo, {}),
    "grpo": ((policy.ppo_clip,), advantages.grpo, {"inner": 4, "rate": 0.3}),
    "dr_grpo": ((policy.ppo_clip,), with_(advantages.grpo, scale=groups.no_scale, eps=0.0), {}),
    "gspo": ((policy.gspo,), advantages.grpo, {}),
    "cispo": ((policy.cispo,), advantages.grpo, {}),
    "stable_reinforce": ((policy.stable_reinforce,), advantages.grpo, {"inner": 4, "rate": 0.3}),
    "ppo": ((policy.ppo_clip, values.clipped_value_loss), advantages.gae, {"inner": 4, "start": (0.0,) * 5}),
    "trust_region": ((policy.dppo_tv,), advantages.grpo, {"inner": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGMAX)
def test_without_a_kl_the_best_word_takes_all(name):
    losses, advantage_fn, settings = ARGMAX[name]
    found = learned(losses, advantage_fn, **settings)
    assert found[REWARD.argmax()] > 0.995, found


def test_with_k2_in_the_loss_the_optimum_is_the_tilted_reference():
    """k2's gradient is that of KL(policy || reference), exactly. GRPO's scores are the standardized ones."""
    kl = with_(regularizers.kl_penalty, kl_coef=BETA, estimator=divergences.k2)
    assert_near(learned((policy.ppo_clip, kl)), tilted(STANDARD))


def test_with_k3_in_the_loss_it_is_another_one():
    """k3's gradient is that of the *forward* KL, so GRPO as published has a different optimum."""
    kl = with_(regularizers.kl_penalty, kl_coef=BETA, estimator=divergences.k3)
    found = learned((policy.ppo_clip, kl))
    assert_near(found, forward_tilted(STANDARD))
    assert np.abs(found - tilted(STANDARD)).max() > 0.02
    straight_through = with_(regularizers.kl_penalty, kl_coef=BETA, estimator=divergences.k3_with_k2_grad)
    assert_near(learned((policy.ppo_clip, straight_through)), tilted(STANDARD))


def test_with_k1_in_the_loss_there_is_no_kl_at_all():
    kl = with_(regularizers.kl_penalty, kl_coef=BETA, estimator=divergences.k1)
    assert learned((policy.ppo_clip, kl))[REWARD.argmax()] > 0.995


@pytest.mark.parametrize("inside", [advantages.reinforce, advantages.gae, advantages.rloo])
def test_with_the_kl_in_the_reward_it_is_the_tilted_reference(inside):
    """With any baseline, and with the score's own scale."""
    advantage_fn = with_(advantages.kl_in_reward, advantage_fn=inside, kl_coef=BETA)
    losses = (policy.ppo_clip, with_(values.value_loss, value_coef=0.5))
    assert_near(learned(losses, advantage_fn, start=(0.0,) * 5), tilted(REWARD))


def test_an_entropy_bonus_makes_a_softmax():
    found = learned((policy.ppo_clip, with_(regularizers.entropy_bonus, entropy_coef=BETA)))
    assert_near(found, softmax(STANDARD / BETA))


@pytest.mark.parametrize("weight_of", [jnp.exp, data_weights([0.25] * 4)], ids=["on_policy", "off_policy"])
def test_trajectory_balance_samples_in_proportion(weight_of):
    """A GFlowNet's optimum, on its own samples and on any others that cover the language."""
    advantage_fn = with_(advantages.trajectory_balance, kl_coef=BETA)
    assert_near(learned((policy.trajectory_balance,), advantage_fn, weight_of=weight_of), tilted(REWARD))


def all_duels():
    """(batch, weights): every ordered pair of words as a group, as often as Bradley-Terry says the first wins."""
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    words = [word for pair in pairs for word in pair]
    group = [2 * (i // 2) for i in range(len(words))]
    wins = np.array([1 / (1 + np.exp(REWARD[b] - REWARD[a])) for a, b in pairs])
    batch = rows_of(words, group, [1.0, 0.0] * len(pairs))
    return batch, np.repeat(wins / wins.sum() / 2, 2), wins


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_dpo_finds_the_rewards_behind_the_duels(beta):
    batch, weights, _ = all_duels()
    found = learned((with_(preference.dpo, beta=beta),), batch=batch, weight_of=data_weights(weights), rate=8.0)
    assert_near(found, tilted(REWARD, beta))


def test_cpo_finds_them_without_a_reference():
    batch, weights, _ = all_duels()
    cpo = with_(preference.cpo, beta=BETA, nll_coef=0.0)
    found = learned((cpo,), batch=batch, weight_of=data_weights(weights), rate=8.0)
    assert_near(found, softmax(REWARD / BETA))


def test_ipo_is_linear_in_the_win_rates():
    """Least squares: Delta_a - Delta_b = (P(a beats b) - P(b beats a)) / (2 tau) on all pairs at once."""
    batch, weights, wins = all_duels()
    tau = 0.4
    found = learned((with_(preference.ipo, tau=tau),), batch=batch, weight_of=data_weights(weights), rate=1.0)
    table = np.zeros((4, 4))
    table[~np.eye(4, dtype=bool)] = wins
    assert_near(found, softmax(np.log(REFERENCE) + (table - table.T).mean(axis=1) / (2 * tau)))


def test_kto_keeps_what_is_more_often_liked_than_not():
    """Each word liked with its own probability: those above one half take all."""
    liked = np.array([0.4, 0.6, 0.7, 0.1])
    batch = rows_of([*range(4), *range(4)], [0] * 8, [1.0] * 4 + [0.0] * 4)
    weights = np.concatenate([liked, 1 - liked]) / 4
    found = learned((with_(preference.kto, beta=1.0),), advantages.kto, batch=batch, weight_of=data_weights(weights))
    assert found[1] + found[2] > 0.98, found


def test_likelihood_learns_the_data_as_it_is():
    data = np.array([0.1, 0.2, 0.3, 0.4])
    assert_near(learned((supervised.next_token,), weight_of=data_weights(data)), data)


def test_distillation_on_ones_own_words_reaches_the_teacher():
    assert_near(learned((with_(distillation.teacher_kl, kl_coef=1.0),)), REFERENCE)


def test_kdrl_lies_between_teacher_and_reward():
    losses = (policy.ppo_clip, with_(distillation.teacher_kl, kl_coef=BETA))
    assert_near(learned(losses), tilted(STANDARD))


def test_nft_and_dr_grpo_agree_on_policy():
    """A 0/1 reward: both leave nothing on wrong words, and keep what the right ones had relative to each other."""
    batch = rows_of(range(4), [0] * 4, [1.0, 0.0, 1.0, 0.0])
    dr_grpo = with_(advantages.grpo, scale=groups.no_scale, eps=0.0)
    start = (0.5, 0.0, 0.0, 0.0)
    nft = learned((policy.nft,), dr_grpo, batch=batch, start=start)
    same = learned((policy.ppo_clip,), dr_grpo, batch=batch, start=start)
    assert nft[1] + nft[3] < 0.005
    assert_near(nft, same)


def test_the_optima_differ_where_they_should():
    """On one reward: PPO without KL wants the best word, the GFlowNet and DPO the tilted reference."""
    ppo = learned((policy.ppo_clip,))
    flow = learned((policy.trajectory_balance,), with_(advantages.trajectory_balance, kl_coef=BETA))
    batch, weights, _ = all_duels()
    dpo = learned((with_(preference.dpo, beta=BETA),), batch=batch, weight_of=data_weights(weights), rate=8.0)
    assert_near(flow, dpo)
    assert np.abs(ppo - flow).max() > 0.3
