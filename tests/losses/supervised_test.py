"""Next-token loss by hand, and the mask of last turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import build, jit_and_plain

from mlrl import reductions
from mlrl.losses import supervised

MASK = np.array([[0, 1, 1], [0, 1, 0]], bool)


@jit_and_plain
@pytest.mark.parametrize(
    "reduction,expected,slope",
    [
        (reductions.token_mean, (0.5 + 1 + 3) / 3, [[0, -1 / 3, -1 / 3], [0, -1 / 3, 0]]),
        (reductions.sequence_mean_token_mean, (0.75 + 3) / 2, [[0, -0.25, -0.25], [0, -0.5, 0]]),
    ],
    ids=["token_mean", "sequence_mean"],
)
def test_next_token_by_hand(reduction, expected, slope, wrap):
    log_probs = jnp.array([[jnp.nan, -0.5, -1.0], [jnp.nan, -3.0, jnp.nan]])
    scores, batch = build(MASK, group=[0, 1], outcome=[0, 0], reduction=reduction, log_probs=log_probs)
    loss, metrics = wrap(supervised.next_token)(scores, batch)
    assert float(loss) == pytest.approx(expected)
    assert float(metrics["log_prob/mean"]) == pytest.approx(-4.5 / 3)
    gradient = wrap(jax.grad(lambda s: supervised.next_token(s, batch)[0]))(scores).log_probs
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


def test_last_turns():
    mask = jnp.array([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    turn = jnp.array([[0, 0, 1, 1, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert supervised.last_turns(mask, turn).astype(int).tolist() == [[0, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0] * 5]
    assert supervised.last_turns(mask, turn, turns=2)[0].astype(int).tolist() == [0, 0, 0, 1, 1]
