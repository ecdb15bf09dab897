"""Shipped rewards that run in the graph: verifiers of made-up puzzles, lengths, and the random control."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl import groups
from mlrl.rewards.lifting import stateful
from mlrl.tasks import verifiers
from mlrl.types import Array, Prompts, Refused, RewardFn, Rollout


def arithmetic(rollout: Rollout, prompts: Prompts) -> Array:
    """1 if the completion is the example's answer, token for token, and then stops; else 0. [B] float32."""
    return verifiers.arithmetic_verifier(rollout, prompts)


def final_answer(rollout: Rollout, prompts: Prompts) -> Array:
    """1 if what follows the completion's last separator is the answer, and it stops; else 0. [B] float32."""
    return verifiers.final_answer_verifier(rollout, prompts)


def countdown(rollout: Rollout, prompts: Prompts) -> Array:
    """1 if the completion is an expression over the given numbers with the target's value. [B] float32."""
    return verifiers.countdown_verifier(rollout, prompts)


def ngram_overlap(rollout: Rollout, prompts: Prompts, *, max_order: int = 6, beta: float = 2.0) -> dict[str, Array]:
    """How close the completion comes to the answer: {"reward": `verifiers.ngram_f_verifier`, "outcome": exactly right}.

    Args:
      max_order, beta: of the n-grams of tokens and of recall, as in chrF.
    """
    close = verifiers.ngram_f_verifier(rollout, prompts, max_order=max_order, beta=beta)
    return {"reward": close, "outcome": verifiers.arithmetic_verifier(rollout, prompts)}


def noisy(
    rollout: Rollout, prompts: Prompts, *, verifier: Callable[[Rollout, Prompts], Array] = arithmetic,
    noise: float = 1.0, seed: int = 0,
) -> dict[str, Array]:  # fmt: skip
    """A learned verifier in miniature: the reward leans to what is right, and errs; the outcome is the verifier's.

        reward = tanh(2 v - 1 + noise * e),  e ~ Normal(0, 1) by prompt and completion

    As with a model, the same completion of the same prompt always gets the same score, whoever asks and when.

    Args:
      verifier: (rollout, prompts) -> v [B], 1 where right and 0 where wrong.
      noise: standard deviation, before the tanh.
      seed: of the errors.
    Returns:
      {"reward": [B] in [-1, 1], "outcome": [B]}.
    """
    right = verifier(rollout, prompts)
    first, second = groups.fingerprint(jnp.where(rollout.valid, rollout.tokens, -1))
    fold = jax.vmap(jax.random.fold_in)
    branch = jax.random.fold_in(jax.random.key(seed), 0x6E6F6973)  # not the keys of a run with the same seed
    keys = fold(jax.vmap(lambda data: jax.random.fold_in(branch, data))(first), second)
    error = jax.vmap(lambda key: jax.random.normal(key))(keys)
    return {"reward": jnp.tanh(2.0 * right - 1.0 + noise * error), "outcome": right}


def length_tokens(rollout: Rollout, prompts: Prompts) -> Array:
    """How many tokens the policy chose in the row, the EOS included. [B] float32."""
    return rollout.action_mask.sum(axis=1).astype(jnp.float32)


def token_count(rollout: Rollout, prompts: Prompts, *, token: int) -> Array:
    """How often the policy chose the token with the id `token`: what a proxy may overrate. [B] float32."""
    return (rollout.action_mask & (rollout.tokens == token)).sum(axis=1).astype(jnp.float32)


def overlong(rollout: Rollout, prompts: Prompts, *, max_tokens: int, buffer_tokens: int) -> Array:
    """The soft penalty of long completions: 0 up to max - buffer, falling linearly to -1 at max.

        penalty = clip((max_tokens - buffer_tokens - length) / buffer_tokens, -1, 0)

    Args:
      max_tokens: length at which the penalty is full; usually the most that is sampled, or a little less.
      buffer_tokens: width of the slope.
    Returns:
      [B] float32 in [-1, 0]; a part of a weighted sum, whose outcome another part gives.
    Raises:
      Refused: unless 0 < buffer_tokens <= max_tokens.
    Reference: Yu et al. (2025), DAPO, equation 13.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise Refused(f"overlong needs 0 < buffer_tokens <= max_tokens, got buffer_tokens={buffer_tokens}, "
                      f"max_tokens={max_tokens}")  # fmt: skip
    free = max_tokens - buffer_tokens
    return jnp.clip((free - length_tokens(rollout, prompts)) / buffer_tokens, -1.0, 0.0)


def truncated_penalty(rollout: Rollout, prompts: Prompts) -> Array:
    """-1 for a row that ended because it was full, not because the policy stopped; else 0. [B] float32."""
    return -jnp.asarray(rollout.truncated, jnp.float32)


def from_environment(rollout: Rollout, prompts: Prompts) -> dict[str, Array]:
    """What an environment or a game paid, where it paid it: each payment sits at the last token of its turn.

    {"reward": earned [B,L], ...}; what else the environment says of an episode is logged as parts. A row in which the
    policy did not act (another player's, or one whose game was over before its turn) is unscored. The outcome of a row
    is the sum of its payments.

    Raises:
      Refused: no environment made the rollout.
    """
    if isinstance(rollout.earned, tuple):
        raise Refused("from_environment: this rollout has no environment that pays: set Experiment.rollout_fn to "
                      "multi_turn.multi_turn or self_play.self_play, or choose another reward")  # fmt: skip
    acted = rollout.action_mask.any(axis=1)
    total = jnp.where(acted, jnp.where(rollout.action_mask, rollout.earned, 0.0).sum(axis=1), jnp.nan)
    return {"reward": rollout.earned, "outcome": total, **rollout.facts}


def random(*, seed: int = 0, rate: float = 0.5) -> RewardFn:
    """The control: 1 with probability `rate` and 0 otherwise, whatever the completion says.

    Its state counts the calls, and call number c draws from the key folded with c: deterministic, and a
    resumed run goes on where it was.

    Raises:
      Refused: rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise Refused(f"random: rate must lie in [0, 1], got {rate}")

    def draw(calls: Array, rollout: Rollout, prompts: Prompts) -> tuple[Array, Array]:
        branch = jax.random.fold_in(jax.random.key(seed), 0x72616E64)  # not the keys of a run with the same seed
        key = jax.random.fold_in(branch, calls)
        return jax.random.bernoulli(key, rate, rollout.tokens.shape[:1]).astype(jnp.float32), calls + 1

    return stateful(lambda: jnp.zeros((), jnp.int32), draw, name="random")
