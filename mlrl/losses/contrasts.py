"""The equations of direct preference optimization: losses of a pair, from the implicit rewards of its two rows.

Each takes chosen and rejected, which broadcast against each other, and returns one loss per pair. A reward is
beta * Delta, Delta the row's log-ratio to the reference. They are handed to `losses.preference.dpo` as `contrast`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl.types import Array


def _minus_log_sigmoid(x: Array) -> Array:
    return jax.nn.softplus(-x)


def logistic(chosen: Array, rejected: Array, *, label_smoothing: float = 0.0) -> Array:
    """DPO: -log sigmoid(margin), with labels flipped with probability `label_smoothing` (conservative DPO).

        (1 - e) l(margin) + e l(-margin),   l(x) = -log sigmoid(x), margin = chosen - rejected, e = label_smoothing

    Reference: Rafailov et al. 2023; Mitchell 2023 for the smoothing.
    """
    margin = chosen - rejected
    return (1.0 - label_smoothing) * _minus_log_sigmoid(margin) + label_smoothing * _minus_log_sigmoid(-margin)


def robust(chosen: Array, rejected: Array, *, label_smoothing: float = 0.1) -> Array:
    """rDPO: what conservative DPO becomes when the noise of the labels is taken out without bias; not bounded below.

        ((1 - e) l(margin) - e l(-margin)) / (1 - 2 e),   l(x) = -log sigmoid(x), e = label_smoothing < 1/2

    Reference: Chowdhury et al. 2024, "Provably Robust DPO".
    """
    margin, e = chosen - rejected, label_smoothing
    return ((1.0 - e) * _minus_log_sigmoid(margin) - e * _minus_log_sigmoid(-margin)) / (1.0 - 2.0 * e)


def hinge(chosen: Array, rejected: Array) -> Array:
    """max(0, 1 - margin). Reference: Liu et al. 2023 (RSO); Zhao et al. 2023 (SLiC)."""
    return jax.nn.relu(1.0 - (chosen - rejected))


def exo(chosen: Array, rejected: Array, *, label_smoothing: float = 1e-3) -> Array:
    """KL from the policy's preference (sigmoid(margin), 1 - that) to the labels' (1 - e, e).

    Reference: Ji et al. 2024, "Efficient Exact Optimization" (EXO), for pairs.
    """
    margin = chosen - rejected
    win, lose = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
    to_win = -_minus_log_sigmoid(margin) - jnp.log1p(-label_smoothing)
    return win * to_win + lose * (-_minus_log_sigmoid(-margin) - jnp.log(label_smoothing))


def nca(chosen: Array, rejected: Array) -> Array:
    """Noise contrastive alignment: the chosen reward also has a ceiling.

        l(chosen) + (l(-chosen) + l(-rejected)) / 2,   l(x) = -log sigmoid(x)

    Reference: Chen et al. 2024 (NCA).
    """
    return (
        _minus_log_sigmoid(chosen) + 0.5 * _minus_log_sigmoid(-chosen) + 0.5 * _minus_log_sigmoid(-rejected)
    )


def bco(chosen: Array, rejected: Array) -> Array:
    """Binary classifier, chosen and rejected each by itself: -log sigmoid(chosen) - log sigmoid(-rejected).

    Reference: Jung et al. 2024. Left out: its shift.
    """
    return _minus_log_sigmoid(chosen) + _minus_log_sigmoid(-rejected)


def sppo(chosen: Array, rejected: Array) -> Array:
    """SPPO with hard labels, times beta^2: (chosen - 1/2)^2 + (rejected + 1/2)^2. Reference: Wu et al. 2024."""
    return jnp.square(chosen - 0.5) + jnp.square(rejected + 0.5)


def apo_zero(chosen: Array, rejected: Array) -> Array:
    """APO for chosen rows better than the policy's own: raises chosen, lowers rejected.

        sigmoid(-chosen) + sigmoid(rejected)

    Reference: D'Oosterlinck et al. 2024, "Anchored Preference Optimization".
    """
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(chosen: Array, rejected: Array) -> Array:
    """APO for chosen rows worse than the policy's own: lowers chosen, and rejected more.

        sigmoid(chosen) + sigmoid(rejected - chosen)

    Reference: as `apo_zero`.
    """
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def discopop(chosen: Array, rejected: Array, *, temperature: float = 0.05) -> Array:
    """A blend of the logistic and the exponential loss by s = sigmoid(margin / temperature).

        (1 - s) * -log sigmoid(margin) + s * exp(-margin)

    The exponent is held at 20, for the rows that are no pair.

    Reference: Lu et al. 2024, "Discovering Preference Optimization Algorithms".
    """
    margin = chosen - rejected
    share = jax.nn.sigmoid(margin / temperature)
    return (1.0 - share) * _minus_log_sigmoid(margin) + share * jnp.exp(jnp.minimum(-margin, 20.0))
