"""Credit along a row: the GAE table, holes in the mask, bootstrapping, macro actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlrl import returns

R, V, ALL = jnp.array([[1.0, 2, 3]]), jnp.array([[0.5, 1, 1.5]]), jnp.ones((1, 3), bool)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
@pytest.mark.parametrize(
    "discount,lam,expected", [(1, 1, [6, 5, 3]), (0.5, 1, [2.75, 3.5, 3]), (1, 0.5, [3.625, 4.25, 3])]
)
def test_gae_returns_by_hand(discount, lam, expected, wrap):
    run = wrap(lambda r, v: returns.gae(r, v, ALL, discount=discount, gae_lambda=lam))
    advantages, targets = run(R, V)
    np.testing.assert_allclose(targets, [expected], rtol=1e-6)
    np.testing.assert_allclose(advantages, targets - V, rtol=1e-6)


def holes(x, fill=0.0):
    """The three actions of R and V at columns 1, 3 and 4 of seven; column 2 is an observation."""
    return jnp.full((1, 7), fill).at[0, jnp.array([1, 3, 4])].set(x[0])


MASK = jnp.zeros((1, 7), bool).at[0, jnp.array([1, 3, 4])].set(True)


def test_observations_and_padding_take_no_discount_step():
    kw = dict(discount=0.5, gae_lambda=0.8)
    plain = returns.gae(R, V, ALL, **kw)
    spread = returns.gae(holes(R), holes(V, jnp.nan), MASK, **kw)
    for a, b in zip(plain, spread):
        np.testing.assert_allclose(b[MASK], a[0], rtol=1e-6)
        np.testing.assert_array_equal(b[~MASK], np.zeros(4))


def test_a_reward_on_an_observation_belongs_to_the_action_before_it():
    kw = dict(discount=0.5, gae_lambda=0.8)
    late = holes(R).at[0, 1].set(0.0).at[0, 2].set(1.0).at[0, 4].set(0.0).at[0, 6].set(3.0)
    np.testing.assert_allclose(
        returns.gae(late, holes(V), MASK, **kw)[0], returns.gae(holes(R), holes(V), MASK, **kw)[0], rtol=1e-6
    )


def test_lambda_one_is_reward_to_go_minus_value():
    rewards, values = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    mask = np.random.default_rng(1).random((3, 6)) < 0.6
    advantages, _ = returns.gae(rewards, values, mask, discount=0.9, gae_lambda=1.0)
    to_go = returns.reward_to_go(rewards, mask, discount=0.9)
    np.testing.assert_allclose(advantages, jnp.where(mask, to_go - values, 0.0), rtol=1e-4, atol=1e-5)


def test_lambda_zero_is_the_one_step_error_and_bootstrap_ends_it():
    advantages, _ = returns.gae(R, V, ALL, discount=0.5, gae_lambda=0.0, bootstrap=jnp.array([4.0]))
    np.testing.assert_allclose(advantages, [[1 + 0.5 * 1 - 0.5, 2 + 0.5 * 1.5 - 1, 3 + 0.5 * 4 - 1.5]])


def test_lambda_may_differ_by_row_and_grow_with_length():
    mask = jnp.array([[1] * 40, [1] * 4 + [0] * 36], bool)
    lam = returns.length_adaptive_lambda(mask, alpha=0.05)
    np.testing.assert_allclose(lam, [0.5, 0.0])
    rewards = jnp.ones((2, 40))
    mixed = returns.gae(rewards, rewards, mask, gae_lambda=lam)[0]
    np.testing.assert_allclose(mixed[0], returns.gae(rewards, rewards, mask, gae_lambda=0.5)[0][0])
    np.testing.assert_allclose(mixed[1], returns.gae(rewards, rewards, mask, gae_lambda=0.0)[0][1])


def test_chunks_begin_where_they_are_told_to():
    mask = jnp.array([[0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]], bool)
    begins = jnp.array([[1, 0, 1, 1, 0, 1, 0]] * 2, bool)  # what is said of slots that are no actions is not read
    chunk = returns.chunks_from(begins, mask)
    np.testing.assert_array_equal(chunk, [[0, 0, 1, 1, 1, 2, 2], [0] * 7])
    np.testing.assert_array_equal(returns.begins_of(mask, chunk), [[0, 1, 1, 0, 0, 1, 0], [0] * 7])
    x = jnp.array([[9.0, 1, 2, 9, 3, 4, 9]] * 2)
    np.testing.assert_array_equal(returns.chunk_first(x, mask, chunk)[0], [1, 2, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(returns.chunk_last(x, mask, chunk)[0], [1, 3, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(returns.count_before(mask)[0], [0, 0, 1, 2, 2, 3, 4])


def test_macro_gae_by_hand():
    # chunks {a, b}, {c}: R = [1 + 2, 3], V = [0.75, 1.5]; delta = [3 + 0.75, 1.5]; A = [3.75 + 0.5 * 1.5, 1.5]
    chunk = jnp.array([[0, 0, 1]])
    macro = lambda **kw: [x[0].tolist() for x in returns.macro_gae(R, V, ALL, chunk, gae_lambda=0.5, **kw)]
    assert macro() == [[4.5, 4.5, 1.5], [5.25, 5.25, 3.0]]
    assert macro(value_of=returns.chunk_first) == [[4.75, 4.75, 1.5], [5.25, 5.25, 3.0]]  # V = [0.5, 1.5]
    assert macro(value_of=returns.chunk_last) == [[4.25, 4.25, 1.5], [5.25, 5.25, 3.0]]  # V = [1, 1.5]
    assert macro(reward_of=returns.chunk_mean)[0] == [3.0, 3.0, 1.5]  # R = [1.5, 3]


def test_macro_gae_with_chunks_of_one_is_gae_and_with_one_chunk_a_bandit():
    rewards, values = holes(R).at[0, 0].set(5.0), holes(V)  # the first slot is before the first action
    single = returns.macro_gae(rewards, values, MASK, returns.chunks_from(MASK, MASK), discount=0.9)
    for a, b in zip(single, returns.gae(rewards, values, MASK, discount=0.9)):
        np.testing.assert_array_equal(a, b)
    one = jnp.zeros_like(MASK, int)
    advantages, targets = returns.macro_gae(rewards, values, MASK, one, value_of=returns.chunk_first)
    np.testing.assert_allclose(targets, jnp.where(MASK, 6.0, 0.0))
    np.testing.assert_allclose(advantages, jnp.where(MASK, 5.5, 0.0))
