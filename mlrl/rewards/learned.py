"""A learned reward: what a frozen reward model of the experiment says of a whole row."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlrl.reductions import row_last
from mlrl.types import Array, Models, Prompts, Refused, Rollout

Judge = Callable[[Rollout], Array]  # rows -> values [B,L]
ReadFn = Callable[[Judge, Rollout], Array]  # (reward model, rows) -> [B]


def before_last_action(judge: Judge, rollout: Rollout) -> Array:
    """v(x, y_<T): the value at the last action, which is of the state before it, as `losses.reward_models` trains it.

    The last action of a row that ended is the EOS. [B] float32, 0 for a row without actions.
    """
    return row_last(judge(rollout), rollout.action_mask)


def behind_last_action(judge: Judge, rollout: Rollout) -> Array:
    """v(x, y_<=T): the value of the state behind the last action, where transformers' sequence classifiers are read.

    [B] float32, 0 for a row without actions.
    """
    length = rollout.tokens.shape[1]
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))) if jnp.shape(x)[1:] == (length,) else x, rollout)
    columns = jnp.arange(length + 1)
    behind = jnp.max(jnp.where(wider.action_mask, columns, -2), axis=1, keepdims=True) + 1
    here = columns == behind  # what stands there matters to nothing that is read
    return row_last(judge(wider.replace(valid=wider.valid | here)), here)


def score(models: Models, rollout: Rollout, prompts: Prompts, *, which: int = 0, read: ReadFn = before_last_action,
          unended: float | None = None) -> Array:  # fmt: skip
    """r(x, y) = v_which: the value of a reward model for a whole row.

    The model and its weights are Experiment.reward_models[which]: start.reward_model of a run of
    gin/methods/reward_model.gin, or start.pretrained_reward_model. It reads the row's own tokens. Others around it:
    `combinators.weighted_sum` (an ensemble, or a verifier beside it), `shaped.par`, `graph.overlong`.

    Args:
      models: as the loop binds them.
      rollout: [B,L]; rows without an action are unscored.
      which: of the experiment's reward models.
      read: where the value is read: before_last_action, or behind_last_action for sequence classifiers.
      unended: what a row earns that did not end by itself, on whose like the model was not trained; None: what the
        model says of it.
    Returns: [B] float32.
    Raises: Refused, if the experiment has no such reward model.
    Reference: Ouyang et al. 2022, "Training language models to follow instructions with human feedback". Left out:
      rewards are not shifted so that demonstrations earn 0 on average; baselines and `shaped.standardize` remove it.
    """
    count = len(models.reward_models)
    if not 0 <= which < count:
        raise Refused(f"learned.score asks reward model {which}, and the experiment has {count}: set "
                      "Experiment.reward_models = (@start.reward_model(),)")  # fmt: skip
    found = read(models.reward_models[which], rollout)
    if unended is not None:
        found = jnp.where(jnp.asarray(rollout.truncated), unended, found)
    return jnp.where(jnp.asarray(rollout.action_mask).any(axis=1), found, jnp.nan)
