"""Attempts by hand: what each is paid, when an episode ends, what is repeated; and a rollout of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import advantages, correction, evaluation_attempts
from mlrl import prompts as prompts_lib
from mlrl.batches import unannotated
from mlrl.environments import retry
from mlrl.evaluation import Measured
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rewards import graph
from mlrl.rewards.lifting import lift
from mlrl.rollouts.multi_turn import multi_turn
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import Sampling
from mlrl.tasks import puzzles
from mlrl.types import Refused

TASK = puzzles.arithmetic(digits=1)
WORDS = TASK.vocabulary
EOS, A = WORDS.eos_ids[0], 4


def turn(text, *, ended=True):
    ids = WORDS.encode(text) + [EOS] * ended
    return jnp.asarray(ids + [WORDS.pad_id] * (A - len(ids)), jnp.int32), jnp.int32(len(ids))


def play(environment, answer, *said):
    """(payments, dones) of turns until the episode is over; the right answer is `answer`."""
    ids = jnp.asarray(WORDS.encode(answer) + [0] * (3 - len(answer)), jnp.int32)
    state = environment.reset(jax.random.key(0), {"answer_tokens": ids, "answer_valid": jnp.arange(3) < len(answer)})
    paid, over = [], []
    for tokens, length in said:
        state, told, count, reward, done = environment.step(state, tokens, length)
        assert WORDS.decode(np.asarray(told[:count])) == ":"
        paid.append(float(reward))
        over.append(bool(done))
    return paid, over


@pytest.mark.parametrize("said, right", [
    (turn("12"), 1.0), (turn("13"), 0.0), (turn("1"), 0.0), (turn("121"), 0.0), (turn("", ended=True), 0.0),
    (turn("12", ended=False), 0.0),
])  # fmt: skip
def test_an_attempt_is_right_if_it_is_the_answer_and_then_stops(said, right):
    assert play(retry.always(task=TASK), "12", said) == ([right], [False])


def test_it_asks_again_whatever_was_said():
    environment = retry.always(task=TASK)
    assert play(environment, "12", turn("12"), turn("13")) == ([1.0, 0.0], [False, True])
    assert play(environment, "12", turn("13"), turn("12")) == ([0.0, 1.0], [False, True])


@pytest.mark.parametrize("said, paid, over", [
    ([turn("12")], [1.0], [True]),
    ([turn("3"), turn("12")], [0.0, 0.5], [False, True]),
    ([turn("3"), turn("4"), turn("12")], [0.0, 0.0, 0.25], [False, False, True]),
    ([turn("3"), turn("3"), turn("12")], [0.0, 0.0, 0.25 - 0.5 * (1 - 2 / 3)], [False, False, True]),
    ([turn("3"), turn("3"), turn("3")], [0.0, 0.0, -0.5 * (1 - 1 / 3)], [False, False, True]),
    # two malformed turns leave one answer, which repeats nothing
    ([turn("", ended=True), turn("1234", ended=False), turn("3")], [-0.1, -0.1, 0.0], [False, False, True]),
])  # fmt: skip
def test_until_right_by_hand(said, paid, over):
    environment = retry.until_right(task=TASK, told=":", attempts=3, max_turn_tokens=A)
    found, done = play(environment, "12", *said)
    np.testing.assert_allclose(found, paid, atol=1e-6)
    assert done == over


def test_mistakes_are_refused():
    with pytest.raises(Refused, match="attempts must be a whole number of at least 2"):
        retry.always(task=TASK, attempts=1)
    with pytest.raises(Refused, match="told is empty"):
        retry.until_right(task=TASK, told="")
    with pytest.raises(Refused, match="max_turn_tokens is 5, and that of the rollout 4: make them the same"):
        play(retry.until_right(task=TASK, told=":", max_turn_tokens=5), "12", turn("12"))


MODEL = Transformer(Config(vocabulary_size=WORDS.size, width=16, layers=1, heads=2, kv_heads=1, head_width=8,
                           mlp_width=24))  # fmt: skip
EVEN = retry.always(task=TASK, judge=lambda example, tokens, written: tokens[0] % 2 == 0)  # often right, at random
TWICE = functools.partial(multi_turn, environment=EVEN, max_turns=2, max_turn_tokens=3)


@functools.cache
def episodes():
    """64 rows of each of 4 prompts, by a model that says anything."""
    params = initialize(MODEL, jax.random.key(0))
    run = jax.jit(lambda params, prompts, key: TWICE(
        MODEL, params, prompts, key, vocabulary=WORDS, sampling=Sampling(), group_size=64))  # fmt: skip
    return jax.device_get(run(params, prompts_lib.first(TASK, 4), jax.random.key(1)).check())


def test_a_rollout_pays_each_attempt_at_its_end_and_the_bonus_stays_out_of_the_first():
    rows, prompts = episodes(), prompts_lib.first(TASK, 4)
    for b in range(len(rows.tokens)):
        for k in range(2):
            mine = np.flatnonzero(rows.action_mask[b] & (rows.turn[b] == k))
            said = rows.tokens[b, mine]
            right = said[-1] in WORDS.eos_ids and said[0] % 2 == 0
            assert rows.earned[b, mine[-1]] == right and rows.earned[b, mine].sum() == right
    right, _ = evaluation_attempts.pairs(rows)
    assert right[:, 0].any() and right[:, 1].any(), "the test needs right attempts of both kinds"
    rewards, _ = lift(graph.from_environment).update((), rows, prompts_lib.repeat(prompts, 64), TASK, None)
    found = [advantages.attempts(unannotated(rows, rewards), bonus=bonus)[0] for bonus in (0.0, 10.0)]
    of_first = rows.turn == 0
    np.testing.assert_array_equal(*(np.where(of_first, x, 0.0) for x in found))
    assert (np.where(of_first, 0.0, found[0]) != np.where(of_first, 0.0, found[1])).any()


def test_an_evaluation_of_pairs():
    evaluation = evaluation_attempts.AttemptsEvaluation(TASK, prompts=16, samples=3, rollout_fn=TWICE)
    params = initialize(MODEL, jax.random.key(0))
    results = evaluation.measure(Measured(MODEL, single_turn, MODEL))(params, ())[TASK.name]
    names = [*correction.NAMES, "unchanged"]
    assert set(results) == {*names, *(f"sampled/{name}" for name in names)}
    for prefix in ("", "sampled/"):
        value = {name: results[prefix + name]["value"] for name in names}
        assert value["delta"] == pytest.approx(value["accuracy@t2"] - value["accuracy@t1"])
        assert results[prefix + "delta"]["prompts"] == 16
    plain = evaluation_attempts.AttemptsEvaluation(TASK, prompts=4)
    with pytest.raises(Refused, match="no environment that pays its attempts"):
        plain.measure(Measured(MODEL, functools.partial(single_turn, max_completion_tokens=3), MODEL))(params, ())
