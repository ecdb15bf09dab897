"""Several whole steps as one program: the host hears of a run once in so many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlrl.types import Batch, Metrics, Prompts, Refused, TrainState, require_whole

WholeStep = Callable[[TrainState, Prompts], tuple[TrainState, Metrics, Batch]]


def dispatched(step: WholeStep, next_prompts: Callable[[TrainState], Prompts], count: int) -> WholeStep:
    """`count` whole steps in a row as one step: the same function of state and prompts, by a scan.

    Args:
      step: (state, prompts) -> (state, metrics, batch), jittable.
      next_prompts: the prompts of a state's next step, jittable.
      count: K.
    Returns: (state, the first step's prompts) -> the state after K steps; the metrics of each, stacked to [K], with the
      step's "bad_updates" among them; and the last step's batch, the only one that is kept.
    """
    step = jax.jit(step)  # so that its shapes and its steps come from one trace

    def steps(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics, Batch]:
        def one(carry: tuple[TrainState, Prompts, Batch], _: None) -> tuple[Any, Metrics]:
            state, metrics, batch = step(*carry[:2])
            return (state, next_prompts(state), batch), metrics | {"bad_updates": state.bad_updates}

        _, _, batch = jax.eval_shape(step, state, prompts)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        (state, _, batch), metrics = jax.lax.scan(one, (state, prompts, nothing), length=count)
        return state, metrics, batch

    return steps


def fits(experiment: Any, *, reward_in_graph: bool, one_mesh: bool) -> None:
    """What happens every so many steps happens between dispatches, and a dispatch is one program. Raises Refused."""
    count = experiment.steps_per_dispatch
    require_whole("Experiment", "steps_per_dispatch", count, 1)
    if count == 1:
        return
    if not (experiment.task.in_graph and reward_in_graph):
        whose = "reward" if experiment.task.in_graph else "task"
        raise Refused(f"Experiment.steps_per_dispatch is {count}, but the {whose} is on the host, which every step has "
                      "to wait for: set it to 1, or choose a task and a reward in the graph")  # fmt: skip
    if not one_mesh:
        raise Refused(f"Experiment.steps_per_dispatch is {count}, but rollouts are on another mesh than the update, "
                      "so a step is several programs: set it to 1, or rollout_mesh to @meshes.same")  # fmt: skip
    if experiment.steps_ahead:
        raise Refused(f"Experiment.steps_per_dispatch is {count}, but rollouts are a step ahead of updates: set it to "
                      "1, or steps_ahead to 0")  # fmt: skip
    recording = experiment.recording
    numbers = {
        "Experiment.num_steps": experiment.num_steps, "Recording.save_every_steps": recording.save_every_steps,
        "Recording.samples_every_steps": recording.samples_every_steps,
        **{f"every_steps of the evaluation of {e.task.name!r}": e.every_steps for e in experiment.evaluations},
    }  # fmt: skip
    for name, number in numbers.items():
        if number % count:
            near = [str(n) for n in (number // count * count, (number // count + 1) * count) if n]
            raise Refused(f"{name} is {number}, which is no multiple of Experiment.steps_per_dispatch = {count}: make "
                          f"it {' or '.join(near)}, or change steps_per_dispatch")  # fmt: skip


def can_start(step: int, count: int) -> None:
    """A run goes on from where a dispatch ends. Raises Refused."""
    if step % count:
        raise Refused(f"the run's checkpoint is of step {step}, which is no multiple of Experiment.steps_per_dispatch "
                      f"= {count}: set that to a number that divides {step}")  # fmt: skip
