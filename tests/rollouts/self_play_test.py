"""Games of two: each row is one player's view, reproduced by the scorer; outcomes, seats, opponents and cuts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import scoring
from mlrl.environments.nouns import Game
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.rollouts import turns
from mlrl.rollouts.self_play import self_play
from mlrl.sampling import Sampling
from mlrl.types import Prompts, Refused

V, N, P, A, O, M, G = 23, 2, 5, 3, 4, 6, 8
EOS = 5
MODEL = Transformer(Config(vocabulary_size=V, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48))


class Words:
    size, pad_id, eos_ids = V, 0, (EOS, 6, 7)


def counting(*, most=M, alternate=False) -> Game:
    """Players say tokens. A first token above 19 breaks the rules; below 4 it ends the game and wins 2 to -2; an even
    one gives the mover another move, unless they alternate. A player is told who the other is and what the other said.
    """

    def reset(key):
        seat = jax.random.randint(key, (), 0, 2)
        nothing = jnp.zeros((2, A), jnp.int32)
        return {"turn": jnp.int32(0), "mover": seat, "said": nothing, "length": jnp.zeros(2, jnp.int32),
                "winner": jnp.int32(-1), "broke": jnp.int32(-1)}  # fmt: skip

    def observation(state):
        other = 1 - state["mover"]
        told = jnp.concatenate([10 + other[None], state["said"][other]])
        return told.astype(jnp.int32), jnp.minimum(state["length"][other], 2) * (state["turn"] > 0)

    def step(state, tokens, length):
        me = state["mover"]
        broke, wins = tokens[0] > 19, tokens[0] < 4
        again = (tokens[0] % 2 == 0) & (not alternate)
        ends = broke | wins | (state["turn"] + 1 >= most)
        return {
            "turn": state["turn"] + 1, "mover": jnp.where(again, me, 1 - me),
            "said": state["said"].at[me].set(tokens), "length": state["length"].at[me].set(length),
            "winner": jnp.where(broke, 1 - me, jnp.where(wins, me, jnp.where(ends, 2, -1))),
            "broke": jnp.where(broke, me, -1),
        }  # fmt: skip

    def outcome(state):
        return jnp.where(state["winner"] == 2, 0.0, 4.0 * (jnp.arange(2) == state["winner"]) - 2.0)

    return Game(reset, lambda s: s["mover"], observation, step, lambda s: s["winner"] >= 0, outcome,
                lambda s: s["broke"], O)  # fmt: skip


@functools.cache
@jax.jit
def params():
    """Perturbed, so that no norm is 1 and no two logits are close."""
    start = initialize(MODEL, jax.random.key(0))
    leaves, structure = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def some_prompts() -> Prompts:
    valid = jnp.arange(P)[None] >= P - jnp.asarray((5, 2))[:, None]
    tokens = jax.random.randint(jax.random.key(2), (N, P), 0, V)
    return Prompts(tokens, valid, jnp.zeros(N, jnp.int32), jnp.arange(N), {})


def sample(*, group_size=G, sampling=Sampling(), **knobs):
    knobs = dict(game=counting(), max_moves=M, max_move_tokens=A, max_moves_each=M) | knobs
    run = jax.jit(lambda params, prompts, key: self_play(
        MODEL, params, prompts, key, vocabulary=Words, sampling=sampling, group_size=group_size, **knobs))
    return run(params(), some_prompts(), jax.random.key(3)).check()


@functools.cache
def games():
    return jax.device_get(sample())


def test_the_scorer_reproduces_both_players():
    rollout, prompts = games(), some_prompts()
    shared = scoring.shared_prompts()
    by_row = jax.jit(lambda params: scoring.score(MODEL, params, rollout).log_probs)
    by_group = jax.jit(lambda params: shared.score(
        MODEL, params, prompts, rollout, *shared.prepare(MODEL, params, prompts)).log_probs)
    for said in (by_row(params()), by_group(params())):
        np.testing.assert_allclose(np.where(rollout.action_mask, said, 0.0), rollout.behavior_log_probs, atol=1e-5)
    assert np.abs(rollout.behavior_log_probs).sum() > 0 and bool(shared.readable(prompts, rollout).all())


def moves_of(rows, b):
    """The moves of a row as lists, by turn, and what was read before each."""
    end = P + int(rows.valid[b, P:].sum())
    own = [(int(t), bool(a), int(k)) for t, a, k in zip(*(x[b, P:end] for x in (
        rows.tokens, rows.action_mask, rows.turn)))]  # fmt: skip
    by_turn = range(max((k for *_, k in own), default=-1) + 1)
    said = [[t for t, a, k in own if a and k == turn] for turn in by_turn]
    return said, [[t for t, a, k in own if not a and k == turn] for turn in by_turn]


def replayed(said, seat):
    """The game again by hand, from both players' moves: (winner, who broke, observations of each)."""
    told, next_of, mover, last = [[], []], [0, 0], seat, [[], []]
    for turn in range(M):
        if next_of[mover] == len(said[mover]):
            return None, -1, told  # the game was cut
        other = 1 - mover
        told[mover].append(([10 + other] + last[other])[: min(len(last[other]), 2)] if turn else [])
        word = said[mover][next_of[mover]]
        next_of[mover] += 1
        last[mover] = word
        if word[0] > 19:
            return other, mover, told
        if word[0] < 4:
            return mover, -1, told
        mover = mover if word[0] % 2 == 0 else other
    return 2, -1, told


def test_rows_are_what_the_game_makes_of_both_players_moves():
    rows, seats, ends = games(), set(), set()
    np.testing.assert_array_equal(rows.role, [0, 1] * (N * G // 2))
    np.testing.assert_array_equal(rows.group, np.repeat(np.arange(N), G))
    assert rows.tokens.shape == (N * G, P + M * (O + A))
    branch = jax.random.fold_in(jax.random.key(3), turns.ENVIRONMENT)
    for e in range(N * G // 2):
        both = [moves_of(rows, 2 * e + p) for p in (0, 1)]
        seat = int(counting().reset(jax.random.fold_in(branch, e))["mover"])
        winner, broke, told = replayed([said for said, _ in both], seat)
        seats.add(seat)
        ends.add((winner, broke >= 0))
        for p in (0, 1):
            b = 2 * e + p
            said, read = both[p]
            assert read == told[p] and rows.facts["moves"][b] == len(said)
            outcome = 0.0 if winner == 2 else 2.0 if winner == p else -2.0
            acts = np.flatnonzero(rows.action_mask[b])
            expected = np.zeros(rows.tokens.shape[1])
            if acts.size:
                expected[acts[-1]] = outcome
            np.testing.assert_array_equal(rows.earned[b], expected)
            assert rows.facts["invalid"][b] == (broke == p) and rows.facts["won"][b] == (winner == p)
            assert not rows.truncated[b]
    assert seats == {0, 1} and len(ends) > 2, "the test needs games of several kinds"


def test_a_game_that_is_cut_pays_nobody():
    endless = counting()._replace(done=lambda state: jnp.bool_(False))
    rows = sample(game=endless, max_moves=3)
    assert bool(rows.truncated.all()) and not bool(rows.earned.any())
    short = sample(max_moves_each=1)
    assert short.tokens.shape[1] == P + O + A and bool((short.facts["moves"] <= 1).all())
    cut = np.asarray(short.truncated)
    assert cut.any() and not cut.all() and not np.asarray(short.earned)[cut].any()


def says_two(key, state):
    return jnp.asarray([2, EOS, 9], jnp.int32), jnp.int32(2)


def test_a_fixed_opponent_moves_but_does_not_act():
    rows = jax.device_get(sample(opponent=says_two, game=counting(alternate=True)))
    seat = np.tile([[1, 1], [0, 0]], (N * G // 4, 1)).reshape(-1)
    theirs = rows.role == seat
    assert theirs.sum() == N * G // 2
    assert not rows.action_mask[theirs].any() and not rows.behavior_log_probs[theirs].any()
    moved = rows.facts["moves"] > 0
    for b in np.flatnonzero(theirs & moved):
        end = P + rows.valid[b, P:].sum()
        np.testing.assert_array_equal(rows.tokens[b, end - 2 : end], [2, EOS])
        assert rows.facts["won"][b] == 1 and rows.facts["moves"][b] == 1  # 2 wins at once
    assert (theirs & moved).any() and rows.action_mask[~theirs].any()
    said = jax.jit(lambda params: scoring.score(MODEL, params, rows).log_probs)(params())
    np.testing.assert_allclose(np.where(rows.action_mask, said, 0.0), rows.behavior_log_probs, atol=1e-5)


def test_a_group_of_one_is_one_view_by_turns():
    rows = sample(group_size=1)
    np.testing.assert_array_equal(rows.role, [0, 1])
    np.testing.assert_array_equal(rows.group, [0, 1])
    assert rows.tokens.shape[0] == N


@pytest.mark.parametrize("changed, words", [
    (dict(group_size=3), "set it to an even number"),
    (dict(max_moves=0), "self_play.max_moves must be a whole number"),
    (dict(game=counting), "must be called"),
    (dict(game=counting()._replace(outcome=lambda s: jnp.zeros(3))), r"Game.outcome must be float32\[2\], got float32"),
    (dict(game=counting()._replace(player=lambda s: 0.0)), r"Game.player must be int32\[\], got float32"),
    (dict(game=counting()._replace(observation=lambda s: s["said"])), "Game.observation must return .tokens, length"),
    (dict(game=counting()._replace(step=lambda s, t, l: s | {"mover": l > 1})), r"state\['mover'\] was int32"),
    (dict(opponent=lambda key, state: (jnp.zeros(2, jnp.int32), 1)), r"Opponent.move's tokens must be int32\[3\]"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(changed, words):
    with pytest.raises(Refused, match=words) as refusal:
        jax.eval_shape(lambda: sample(**changed))
    assert "\n" not in str(refusal.value)
