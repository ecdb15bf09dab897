"""Rollouts one step ahead of updates: while a step's rows are rewarded and learned from, the next step's are sampled.

Rows of step t are sampled by the weights before update t - 1, those of steps 0 and 1 by the first weights: the loop
starts sampling the next rows before it rewards and learns from the ones it has, and does not wait for them. Host
rewards then run while devices sample; and where rollouts have devices of their own (`meshes.others`), so do updates. On
the same devices the programs take turns, and only the host's time is won.

Rows keep the log-probs and the version of the policy that sampled them. With `old_log_probs =
scoring.sampler_log_probs` a loss's ratio is that of the current policy to the one that sampled, one update ago, and its
clip bounds the distance from that one. With `scoring.recomputed_log_probs` the ratio is to the policy before the
update, and `losses.corrections` weigh rows by how much likelier they have become.

The rows in waiting are part of the state, `TrainState.pending`, and so of every checkpoint: a run that goes on from one
learns from the very rows that it would have learned from. So the rows after the last step are sampled too: the run may
be made longer.

Reference: Noukhovitch et al. 2024, "Asynchronous RLHF" (their one-step off-policy form).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlrl import meshes
from mlrl.loops import stages
from mlrl.types import Array, Batch, Metrics, Prompts, Refused, Rewards, Rollout, TrainState, require_whole


def fits(experiment: Any) -> None:
    """Raises Refused for what rollouts cannot be ahead of."""
    require_whole("Experiment", "steps_ahead", experiment.steps_ahead, 0)
    if experiment.steps_ahead > 1:
        raise Refused(f"Experiment.steps_ahead is {experiment.steps_ahead}: rollouts are 0 or 1 steps ahead of updates")
    if experiment.steps_ahead and experiment.max_attempts > 1:
        raise Refused(f"Experiment.max_attempts is {experiment.max_attempts}, but rows that are sampled a step ahead "
                      "cannot be exchanged for others: set it to 1, or steps_ahead to 0")  # fmt: skip


def sample_next(parts: Any, state: TrainState, prompts: Prompts) -> Rollout:
    """The current policy's rows for the prompts of the next step, with that step's randomness."""
    return stages.sample_rows(parts, state, prompts, stages.step_key(state.replace(step=state.step + 1), 0))


def with_rows(state: TrainState, prompts: Prompts, sample: Callable[..., Rollout]) -> TrainState:
    """The state before the first step with the rows of that step, by the compiled `sample_next`."""
    rollout = sample(state.replace(step=state.step - 1), prompts)
    return state.replace(pending=_held(prompts, rollout.replace(policy_version=rollout.policy_version + 1)))


def abstract(parts: Any, state: TrainState) -> TrainState:
    """Shapes and dtypes of a state as the loop has it: with rows in waiting, if rollouts are ahead."""
    return state.replace(pending=stages.abstract_rows(parts)[:2]) if parts.experiment.steps_ahead else state


def step_function(parts: Any, run: Any, sample: Callable[..., Rollout], judge: Callable[..., tuple[Rewards, Any]],
                  update: Callable) -> Callable[[TrainState, Prompts], tuple[TrainState, Metrics, Batch]]:  # fmt: skip
    """The step, given the prompts of the next one: sampling these begins, then the rows in waiting are learned from.

    Args:
      sample, judge, update: the compiled `sample_next`; (state, prompts, rollout) -> rewards and the reward's state;
        (state, prompts, rollout, rewards) -> state, metrics, batch.
    """

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
        (waiting, rollout), state = state.pending, state.replace(pending=())
        following = _held(prompts, sample(state, prompts))
        with run.phase("rollout"):
            jax.block_until_ready(rollout)
        with run.phase("reward"):
            rewards, reward_state = judge(state, waiting, rollout)
        with run.phase("update"):
            version = rollout.policy_version
            state, metrics, batch = update(state.replace(reward=reward_state), waiting, rollout, rewards)
            metrics["staleness_steps"] = _staleness(state.step - 1, version)
            jax.block_until_ready(metrics)
        return state.replace(pending=following), metrics, batch

    return step


@jax.jit
def _staleness(step: Array, version: Array) -> Array:
    return jnp.mean((step - version).astype(jnp.float32))


def _held(prompts: Prompts, rollout: Rollout) -> tuple[Prompts, Rollout]:
    """Prompts and rows as the state has them."""
    return jax.device_put((prompts, rollout), meshes.row_shardings((prompts, rollout), jax.sharding.get_mesh()))
