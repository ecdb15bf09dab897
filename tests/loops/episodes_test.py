"""Episodes of several turns in the loops: what cannot work is refused before anything is compiled."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from mlrl import advantages, controllers
from mlrl.environments.nouns import Environment, Game
from mlrl.evaluation import Evaluation
from mlrl.loops import iterated, online
from mlrl.rewards import combinators, graph
from mlrl.rollouts.greedy import with_greedy_row
from mlrl.rollouts.multi_turn import multi_turn
from mlrl.rollouts.self_play import self_play
from mlrl.types import Refused


def echo() -> Environment:
    """Says what was said, pays 1 for the right first token, and never ends."""

    def step(state, tokens, length):
        return state, tokens[:1], jnp.int32(1), (tokens[0] == state["answer"]).astype(jnp.float32), jnp.bool_(False)

    return Environment(lambda key, example: {"answer": example["answer_tokens"][0]}, step, 1)


def war() -> Game:
    """The player with the higher token wins, after one move each."""
    nothing = jnp.full((2,), -1, jnp.int32)
    return Game(
        reset=lambda key: nothing, player=lambda said: (said[0] >= 0).astype(jnp.int32),
        observation=lambda said: (said[:1], jnp.int32(0)),
        step=lambda said, tokens, length: said.at[jnp.argmax(said < 0)].set(tokens[0]),
        done=lambda said: jnp.all(said >= 0), outcome=lambda said: jnp.sign(said - said[::-1]).astype(jnp.float32),
        invalid=lambda said: jnp.int32(-1), observation_tokens=1,
    )  # fmt: skip


TURNS = functools.partial(multi_turn, environment=echo(), max_turns=2, max_turn_tokens=3)
GAMES = functools.partial(self_play, game=war(), max_moves=2, max_move_tokens=1)
PAID = dict(reward_fn=graph.from_environment, evaluations=())


@pytest.mark.parametrize("changes", [
    dict(rollout_fn=TURNS, advantage_fn=advantages.turn_level, length_buckets=(3, 7), micro_batch_rows=4,
         reward_fn=combinators.weighted_sum([graph.from_environment, graph.length_tokens], [1, -1])),
    dict(rollout_fn=functools.partial(with_greedy_row, rollout_fn=TURNS)),
    dict(rollout_fn=GAMES, advantage_fn=advantages.role_conditioned(), max_attempts=2),
])  # fmt: skip
def test_what_works_is_prepared(changes):
    parts = online.prepare(worlds.sums(**PAID | changes))
    assert "rows of 4 +" in online.describe(parts)


def test_a_round_of_episodes_is_prepared():
    parts = iterated.prepare(worlds.round_of_sums(rollout_fn=TURNS, **PAID))
    assert "from_environment" in parts.reward.names


@pytest.mark.parametrize("changes, words", [
    (dict(), "set Experiment.rollout_fn to multi_turn.multi_turn or self_play.self_play"),
    (dict(rollout_fn=GAMES, group_size=3, minibatches=1), "group_size is 3: set it to an even number"),
    (dict(rollout_fn=TURNS, length_buckets=(3, 6)), "completions may have 7 tokens"),
    (dict(rollout_fn=GAMES, evaluations=(Evaluation(
        worlds.sums().task, graph.from_environment, prompts=2, rollout_fn=functools.partial(
            GAMES, opponent=lambda key, said: jnp.int32(3))),)), "Opponent.move must return .tokens, length"),
])  # fmt: skip
def test_what_cannot_work_is_refused(changes, words):
    with pytest.raises(Refused, match=words):
        online.prepare(worlds.sums(**PAID | changes))


def test_a_state_of_several_numbers_is_logged_by_place():
    shown = controllers.as_metrics({"a": jnp.float32(2.0), "b": jnp.arange(2.0)})
    np.testing.assert_array_equal([shown[f"controller/{name}"] for name in ("a", "b/0", "b/1")], [2, 0, 1])
