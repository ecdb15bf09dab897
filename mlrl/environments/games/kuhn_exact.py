"""Kuhn poker solved: the equilibria, the exact value of two policies, and how much the best player wins against one.

A policy is a table [12,2] of probabilities: row 3 h + card, of the betting h so far ("", "x", "b", "xb") and the own
card (J, Q, K), says how likely the timid move (check, or fold) and the bold one (bet, or call) are. Rows of "" and "xb"
are those of who opens the round, player 0; the others are player 1's. What a row lacks to 1 breaks the rules.
All functions are of one round, in chips, and can be jitted and differentiated.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mlrl.environments.games.kuhn_poker import plays
from mlrl.environments.games.words import VOCABULARY, ZERO_SUM
from mlrl.environments.nouns import OpponentFn
from mlrl.types import Array, Refused, Vocabulary

VALUE = -1 / 18  # what player 0 wins in equilibrium
MOST = 2.0  # the most that can be won: what `broken` is a share of

_DIFFERENT = ~np.eye(3, dtype=bool)  # deals [player 0's card, player 1's]
_HIGHER = np.sign(np.arange(3)[:, None] - np.arange(3)[None]).astype(np.float32)  # player 0's


class Exploitability(NamedTuple):
    """How far a policy is from an equilibrium, in chips a round.

    value           what it wins as player 0 against itself as player 1
    against_first   what the best player 1 wins against it as player 0; at least 1/18
    against_second  what the best player 0 wins against it as player 1; at least -1/18
    exploitability  their mean: 0 in equilibrium and nowhere else, where `broken` is zero-sum
    """

    value: Array
    against_first: Array
    against_second: Array
    exploitability: Array


def equilibrium(alpha: float = 1 / 3) -> np.ndarray:
    """The Nash equilibrium in which player 0 bets a J with probability alpha, [12,2] float32.

    Player 0 bets J: alpha, Q: 0, K: 3 alpha; calls with J: 0, Q: alpha + 1/3, K: 1.
    Player 1 bets J: 1/3, Q: 0, K: 1 after a check; calls with J: 0, Q: 1/3, K: 1.

    Raises: Refused, unless alpha lies in [0, 1/3].
    Reference: Kuhn 1950.
    """
    if not 0 <= alpha <= 1 / 3:
        raise Refused(f"equilibrium.alpha must lie in [0, 1/3], got {alpha}")
    bold = [alpha, 0, 3 * alpha, 1 / 3, 0, 1, 0, 1 / 3, 1, 0, alpha + 1 / 3, 1]
    return np.stack([1 - np.asarray(bold), bold], axis=1).astype(np.float32)


def equilibrium_player(alpha: float = 1 / 3, vocabulary: Vocabulary = VOCABULARY, *,
                       max_move_tokens: int = 2) -> OpponentFn:  # fmt: skip
    """An opponent that plays `equilibrium`, in every round alike."""
    return plays(equilibrium(alpha), vocabulary, max_move_tokens=max_move_tokens)


def values(first: Array, second: Array, broken: tuple[float, float] = ZERO_SUM) -> Array:
    """What players 0 and 1 win on average, [2], where player 0 plays table `first` and player 1 `second`.

    Args:
      broken: see kuhn_poker.kuhn_poker.
    """
    first, second = _by_betting(first), _by_betting(second)
    called = _pay(2 * _HIGHER)
    answer = _turn(first[3][:, None], _pay(-1), called, _fault(0, broken))
    checked = _turn(second[1][None], _pay(_HIGHER), answer, _fault(1, broken))
    bet = _turn(second[2][None], _pay(1), called, _fault(1, broken))
    start = _turn(first[0][:, None], checked, bet, _fault(0, broken))
    return jnp.sum(jnp.where(_DIFFERENT[..., None], start, 0.0), axis=(0, 1)) / 6


def best_against_first(first: Array, broken: tuple[float, float] = ZERO_SUM) -> Array:
    """What the best player 1 wins against player 0's rows of a table. It never breaks the rules itself."""
    first = _by_betting(first)
    answer = _turn(first[3][:, None], _pay(-1), _pay(2 * _HIGHER), _fault(0, broken))[..., 1]
    reach = jnp.asarray(_DIFFERENT / 6)
    mass = lambda weight, pay: jnp.sum(reach * weight[:, None] * pay, axis=0)  # noqa: E731
    checks, bets = first[0][:, 0], first[0][:, 1]
    after_check = jnp.maximum(mass(checks, -_HIGHER), mass(checks, answer))
    after_bet = jnp.maximum(mass(bets, -jnp.ones((3, 3))), mass(bets, -2 * _HIGHER))
    faults = mass(1 - checks - bets, MOST * broken[1] * jnp.ones((3, 3)))
    return jnp.sum(after_check + after_bet + faults)


def best_against_second(second: Array, broken: tuple[float, float] = ZERO_SUM) -> Array:
    """What the best player 0 wins against player 1's rows of a table. It never breaks the rules itself."""
    second = _by_betting(second)
    reach = jnp.asarray(_DIFFERENT / 6)
    checked, bet = (second[h][None] for h in (1, 2))
    mass = lambda weight, pay: jnp.sum(reach * weight * pay, axis=1)  # noqa: E731
    broke = MOST * broken[1]
    lacking = lambda row: 1 - row[..., 0] - row[..., 1]  # noqa: E731
    answers = jnp.maximum(mass(checked[..., 1], -jnp.ones((3, 3))), mass(checked[..., 1], 2 * _HIGHER))
    check = mass(checked[..., 0], _HIGHER) + answers + mass(lacking(checked), broke)
    bets = mass(bet[..., 0], jnp.ones((3, 3))) + mass(bet[..., 1], 2 * _HIGHER) + mass(lacking(bet), broke)
    return jnp.sum(jnp.maximum(check, bets))


def exploitability(policy: Array, broken: tuple[float, float] = ZERO_SUM) -> Exploitability:
    """Of a table [12,2] that plays both sides.

    exploitability = (against_first + against_second) / 2, half of what is called NashConv
    """
    one, two = best_against_first(policy, broken), best_against_second(policy, broken)
    return Exploitability(values(policy, policy, broken)[0], one, two, (one + two) / 2)


def _by_betting(policy: Array) -> Array:
    """[4,3,2]."""
    if jnp.shape(policy) != (12, 2):
        raise Refused(f"a policy of Kuhn poker must be [12,2] probabilities, got {list(jnp.shape(policy))}")
    return jnp.asarray(policy, jnp.float32).reshape(4, 3, 2)


def _pay(first: Array | float) -> Array:
    """[3,3,2] from what player 0 wins by deal."""
    first = jnp.broadcast_to(jnp.asarray(first, jnp.float32), (3, 3))
    return jnp.stack([first, -first], axis=-1)


def _fault(offender: int, broken: tuple[float, float]) -> Array:
    """[2]: what both win where `offender` breaks the rules."""
    return MOST * jnp.asarray(broken if offender == 0 else broken[::-1], jnp.float32)


def _turn(row: Array, timid: Array, bold: Array, fault: Array) -> Array:
    """The mean over a mover's moves, of pay [3,3,2] after each; `row` is [3,1,2] or [1,3,2]."""
    chances = row[..., None]
    return chances[..., 0, :] * timid + chances[..., 1, :] * bold + (1 - chances.sum(-2)) * fault
