"""A group whose last row is greedy: the baseline of ReMax, the likely answer that SELM pushes down."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlrl import scoring
from mlrl.models.transformer import Transformer
from mlrl.rollouts.single_turn import single_turn
from mlrl.sampling import GREEDY, Sampling
from mlrl.types import Array, Params, Prompts, Refused, Rollout, RolloutFn, Vocabulary


def with_greedy_row(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    vocabulary: Vocabulary,
    sampling: Sampling,
    group_size: int,
    policy_version: Array | int = 0,
    rollout_fn: RolloutFn = single_turn,
) -> Rollout:
    """`group_size` completions of every prompt: all but the last sampled, with role 0; the last greedy, with role 1.

    A group of one has no greedy row and is what `rollout_fn` makes of it, so evaluations, which sample row by row, are
    not touched. The greedy rows are rewarded, and count in a step's means, like any others: leave them out of a loss by
    `selection.keep_role`. Nobody drew their tokens; their behavior log-probs are those of `sampling`'s temperature
    without filters, so that a loss which reads them sees the ratio 1 before the first update.

    Args:
      prompts: [N,P].
      vocabulary, sampling, group_size, policy_version: given by the loop.
      rollout_fn: makes the rows of one kind: the groups in order, all of role 0.
    Returns: Rollout with B = N * group_size rows, the groups in order.
    """
    given = dict(vocabulary=vocabulary, policy_version=policy_version)
    if group_size == 1:
        return rollout_fn(model, params, prompts, key, sampling=sampling, group_size=1, **given)
    if sampling.chosen_late:
        raise Refused("with_greedy_row needs a temperature that is a number, and rounds choose it here: set "
                      "Experiment.configure = @configurations.fixed()")  # fmt: skip
    drawn = rollout_fn(model, params, prompts, key, sampling=sampling, group_size=group_size - 1, **given)
    best = rollout_fn(model, params, prompts, key, sampling=GREEDY, group_size=1, **given)
    if sampling.temperature != 1.0:
        said = scoring.score(model, params, best, temperature=sampling.temperature,
                             first_column=prompts.tokens.shape[1]).log_probs  # fmt: skip
        best = best.replace(behavior_log_probs=jnp.where(best.action_mask, said, 0.0))
    best = best.replace(role=jnp.ones_like(best.role))
    n = best.group.shape[0]

    def join(rows: Array, last: Array) -> Array:
        grouped = rows.reshape(n, group_size - 1, *rows.shape[1:])
        return jnp.concatenate([grouped, last[:, None]], axis=1).reshape(n * group_size, *rows.shape[1:])

    joined = jax.tree.map(join, drawn, best)
    return joined.replace(group=jnp.repeat(jnp.arange(n, dtype=best.group.dtype), group_size))
