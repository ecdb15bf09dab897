"""Episodes of several turns: the scorer reproduces them, one turn is a single turn, payments sit in their places."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import scoring
from mlrl.environments.nouns import Environment
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rollouts.multi_turn import multi_turn
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import Sampling
from mlrl.types import Prompts, Refused

V, N, P, T, O, K, G = 23, 3, 5, 4, 3, 3, 4
EOS = 5
MODEL = Transformer(Config(vocabulary_size=V, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48))


class Words:
    size, pad_id, eos_ids = V, 0, (EOS, 6, 7)


@functools.cache
@jax.jit
def params():
    """Perturbed, so that no norm is 1 and no two logits are close."""
    start = initialize(MODEL, jax.random.key(0))
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def some_prompts() -> Prompts:
    valid = jnp.arange(P)[None] >= P - jnp.asarray((5, 1, 3))[:, None]
    tokens = jax.random.randint(jax.random.key(2), (N, P), 0, V)
    return Prompts(tokens, valid, jnp.zeros(N, jnp.int32), jnp.arange(N), {"bonus": 10.0 * jnp.arange(N)})


def talkative(*, most=K) -> Environment:
    """Answers with 0 to O tokens, as the first says; pays 1, 2, ... by the turn and the prompt's bonus; ends on an even
    first token, or after `most` turns."""

    def reset(key, example):
        return {"turn": jnp.int32(0), "bonus": example["bonus"]}

    def step(state, tokens, length):
        turn = state["turn"] + 1
        told = jnp.full((O,), 20, jnp.int32) + jnp.minimum(length, 2)
        done = (tokens[0] % 2 == 0) | (turn >= most)
        return state | {"turn": turn}, told, tokens[0] // 2 % (O + 1), turn + state["bonus"], done

    return Environment(reset, step, O)


def sample(rollout_fn=multi_turn, *, model=MODEL, key=3, sampling=Sampling(), **knobs):
    knobs = dict(environment=talkative(), max_turns=K, max_turn_tokens=T) | knobs if rollout_fn is multi_turn else knobs
    run = jax.jit(lambda params, prompts, key: rollout_fn(
        model, params, prompts, key, vocabulary=Words, sampling=sampling, group_size=G, policy_version=7, **knobs))
    return run(params(), some_prompts(), jax.random.key(key)).check()


@functools.cache
def episodes():
    return jax.device_get(sample())


def test_the_scorer_reproduces_the_sampler_and_so_does_the_shared_prompt():
    rollout, prompts = sample(sampling=Sampling(temperature=0.8)), some_prompts()
    assert bool(jnp.any(jnp.diff(rollout.action_mask.astype(jnp.int32), axis=1) == -1)), "the test needs observations"
    shared, settings = scoring.shared_prompts(), dict(temperature=0.8)
    by_row = jax.jit(lambda params: scoring.score(MODEL, params, rollout, **settings).log_probs)
    by_group = jax.jit(lambda params: shared.score(
        MODEL, params, prompts, rollout, *shared.prepare(MODEL, params, prompts), **settings).log_probs)
    for said in (by_row(params()), by_group(params())):
        np.testing.assert_allclose(np.where(rollout.action_mask, said, 0.0), rollout.behavior_log_probs, atol=1e-5)
    assert bool(shared.readable(prompts, rollout).all())


def test_turns_through_caches_in_8_bits_are_scored_about_as_they_were_sampled():
    model = Transformer(dataclasses.replace(MODEL.config, cache_dtype="int8"))
    rollout = sample(model=model)
    exact = jax.jit(functools.partial(scoring.score, MODEL))(params(), rollout).log_probs
    gap = jnp.abs(jnp.where(rollout.action_mask, exact - rollout.behavior_log_probs, 0.0))
    assert jnp.max(rollout.turn) > 0 and 1e-5 < jnp.max(gap) < 0.05


def test_one_turn_is_a_single_turn():
    one = sample(environment=talkative(most=1), max_turns=1)
    plain = sample(single_turn, max_completion_tokens=T)
    for name in ("tokens", "valid", "action_mask", "behavior_log_probs", "turn", "role", "group", "truncated",
                 "policy_version"):  # fmt: skip
        np.testing.assert_array_equal(getattr(one, name), getattr(plain, name), err_msg=name)


def test_the_first_turn_does_not_depend_on_those_after_it():
    first, whole = sample(single_turn, max_completion_tokens=T), episodes()
    length = first.action_mask.sum(axis=1)
    for b in range(N * G):
        np.testing.assert_array_equal(first.tokens[b, : P + length[b]], whole.tokens[b, : P + length[b]])


def replayed(b):
    """Row b, made again from its actions alone: (tokens, action mask, turn, earned, turns, last turn's EOS)."""
    row = jax.tree.map(lambda x: x[b], episodes())
    bonus, made, acted, turn, earned = 10.0 * int(row.group), [], [], [], []
    column = P
    for k in range(K):
        said = []
        while len(said) < T and (not said or said[-1] not in Words.eos_ids):
            said.append(int(row.tokens[column + len(said)]))
        done = said[0] % 2 == 0 or k + 1 == K
        told = [] if done else [20 + min(len(said), 2)] * (said[0] // 2 % (O + 1))
        made += said + told
        acted += [True] * len(said) + [False] * len(told)
        turn += [k] * len(said) + [k + 1] * len(told)
        earned += [0.0] * (len(said) - 1) + [k + 1 + bonus] + [0.0] * len(told)
        column += len(said) + len(told)
        if done:
            return made, acted, turn, earned, k + 1, said[-1] in Words.eos_ids


def test_rows_are_what_the_environment_makes_of_their_actions():
    rows, counts, silences = episodes(), [], 0
    for b in range(N * G):
        made, acted, turn, earned, count, whole = replayed(b)
        end = P + len(made)
        np.testing.assert_array_equal(rows.tokens[b, P:end], made)
        np.testing.assert_array_equal(rows.action_mask[b, P:end], acted)
        np.testing.assert_array_equal(rows.turn[b, P:end], turn)
        np.testing.assert_array_equal(rows.earned[b, P:end], earned)
        assert not rows.valid[b, end:].any() and not rows.action_mask[b, end:].any() and rows.valid[b, P:end].all()
        assert not rows.earned[b, end:].any() and (np.diff(rows.turn[b]) >= 0).all()
        assert rows.facts["turns"][b] == count and rows.truncated[b] == (not whole)
        counts.append(count)
        silences += (np.diff(turn) > 0).any() and all(acted)
    assert rows.tokens.shape == (N * G, P + K * T + (K - 1) * O) and len(set(counts)) > 1
    assert silences, "the test needs an observation without tokens"
    np.testing.assert_array_equal(rows.policy_version, 7)


def test_an_episode_that_never_ends_is_cut_and_marked():
    environment = talkative()
    endless = environment._replace(step=lambda *args: (*environment.step(*args)[:4], jnp.bool_(False)))
    rows = sample(environment=endless, max_turns=2)
    assert bool(rows.truncated.all()) and bool((rows.facts["turns"] == 2).all())
    assert not bool(rows.facts["over"].any()) and bool(episodes().facts["over"].all())


@pytest.mark.parametrize("changed, words", [
    (dict(max_turns=0), "max_turns must be a whole number of at least 1"),
    (dict(environment=talkative), "must be called"),
    (dict(environment=talkative()._replace(observation_tokens=2)), r"observation must be int32\[2\], got int32\[3\]"),
    (dict(environment=talkative()._replace(reset=lambda key, example: example["answer"])), "reset raised KeyError"),
    (dict(environment=talkative()._replace(step=lambda s, t, l: (s, t, l))), "must return .state, observation"),
    (dict(environment=talkative()._replace(step=lambda s, t, l: (
        {"turn": s["turn"]}, jnp.zeros(O, jnp.int32), l, 0.0, l > 0))), "state of the structure"),
    (dict(environment=talkative()._replace(step=lambda s, t, l: (
        s | {"turn": 0.5}, jnp.zeros(O, jnp.int32), l, 0.0, l > 0))), r"state\['turn'\] was int32\[\] and is float32"),
    (dict(environment=talkative()._replace(step=lambda s, t, l: (
        s, jnp.zeros(O, jnp.int32), l, 0.0, l))), r"done must be bool\[\], got int32"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(changed, words):
    with pytest.raises(Refused, match=words) as refusal:
        jax.eval_shape(lambda: sample(**changed))
    assert "\n" not in str(refusal.value)


def test_rows_longer_than_a_table_of_positions_are_refused():
    short = Transformer(dataclasses.replace(MODEL.config, learned_positions=P + 2 * T))
    with pytest.raises(Refused, match="multi_turn.max_turns or max_turn_tokens"):
        jax.eval_shape(lambda: multi_turn(
            short, {}, some_prompts(), jax.random.key(0), vocabulary=Words, sampling=Sampling(), group_size=G,
            environment=talkative(), max_turns=K, max_turn_tokens=T))  # fmt: skip
