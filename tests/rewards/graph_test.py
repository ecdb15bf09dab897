"""Rewards in the graph that nothing else tests."""

import functools

import jax
import numpy as np
from reward_worlds import prompts_of, rollout_of

from mlrl.rewards import graph


def test_a_noisy_verifier_errs_alike_on_equal_rows_and_leans_to_what_is_right():
    rollout = rollout_of(["a"] * 2 + [str(number) for number in range(400)])
    prompts = prompts_of(402)
    right = np.arange(402) % 2 == 0
    noisy = functools.partial(graph.noisy, verifier=lambda rollout, prompts: right.astype(np.float32))
    judge = lambda **knobs: jax.jit(functools.partial(noisy, **knobs))(rollout, prompts)  # noqa: E731
    found, other = judge(noise=1.0), judge(noise=1.0, seed=1)
    score, error = np.asarray(found["reward"]), np.arctanh(np.asarray(found["reward"], float)) - (2.0 * right - 1.0)
    assert abs(error[0] - error[1]) < 1e-3, "the two rows say the same"
    assert (np.abs(score) <= 1).all() and np.array_equal(found["outcome"], right)
    assert abs(error[2:].mean()) < 0.2 and 0.8 < error[2:].std() < 1.2, "four standard errors"
    assert not np.allclose(score, other["reward"])
    np.testing.assert_allclose(judge(noise=0.0)["reward"], np.tanh(2.0 * right - 1.0), rtol=1e-6)
