"""Several seeds of one online experiment, trained together by one compiled step; each is a run with its own folder."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlrl import meshes, runs
from mlrl.evaluation import evaluator
from mlrl.loops import dispatch, online, stages
from mlrl.loops.states import abstract_state, initial_state
from mlrl.types import Batch, Metrics, Refused, TrainState, require_whole


def fits(parts: Any, count: int) -> None:
    """Whether `count` seeds of a prepared experiment can be one program. Raises Refused."""
    require_whole("mlrl train", "seeds", count, 1)
    experiment, alone = parts.experiment, ""
    if not isinstance(experiment, online.Experiment):
        alone = "its loop is not the online one"
    elif not (experiment.task.in_graph and parts.reward.in_graph):
        alone = f"the {'reward' if experiment.task.in_graph else 'task'} is on the host"
    elif not stages.one_mesh(parts):
        alone = "rollouts are on another mesh than the update"
    elif experiment.steps_ahead:
        alone = "rollouts are a step ahead of updates"
    elif jax.process_count() > 1:
        alone = f"the run is in {jax.process_count()} processes"
    if alone:
        first = experiment.seed
        raise Refused(f"{count} seeds cannot be trained by one program, since {alone}: leave out --seeds, and train "
                      f"them one after another, by --gin.SEED={first} to --gin.SEED={first + count - 1}")  # fmt: skip


def train(parts: online.Parts, experiments: Sequence[online.Experiment],
          folders: Sequence[Any]) -> list[TrainState]:  # fmt: skip
    """Trains the same experiment with several seeds, each in the run folder of its place. Returns their last states.

    Every seed is the run that `online.train` makes of it, up to rounding: it draws its own prompts, samples with its
    own randomness, and is saved, logged and evaluated by itself. Whatever stops one stops all, after the same step.
    A seed's seconds are its share of the time of all.

    Args:
      parts: of any of the experiments.
      experiments: alike but for their seeds and what those make of the first parameters.
      folders: run folders, of the same number of steps done.
    Raises: Refused, if the folders hold different steps.
    """
    num_steps, each = parts.experiment.num_steps, parts.experiment.steps_per_dispatch
    watch = Stopwatch(len(folders))
    with contextlib.ExitStack() as stack, meshes.use(parts.experiment.mesh()) as mesh:
        opened = [
            stack.enter_context(runs.Run(folder, experiment.recording, title=f"seed {experiment.seed}", now=watch))
            for experiment, folder in zip(experiments, folders, strict=True)
        ]
        alone = []
        for run, experiment in zip(opened, experiments):
            own = dataclasses.replace(parts, experiment=experiment)
            alone.append(run.restore_or(abstract_state(own), lambda own=own: initial_state(own), mesh))
        start = _common_step(opened, alone)
        dispatch.can_start(start, each)
        evaluate = evaluator(
            parts.experiment.evaluations, parts.model, parts.experiment.rollout_fn, parts.reference_model)  # fmt: skip
        for run, experiment, state in zip(opened, experiments, alone):
            run.begin(experiment.task, num_steps, evaluate, state)
        do = programs(parts, mesh, mesh.devices.flat[0].platform)
        states = do.stack(alone)
        del alone, state
        for step in range(start, num_steps, each):
            with watch.running():
                states, metrics, batches = do.step(states)
                metrics = jax.device_get(metrics)
            with _all_before_the_first_stops() as last_word:
                for i, run in enumerate(opened):
                    with last_word(run):
                        own = jax.tree.map(operator.itemgetter(i), metrics)
                        run.record(do.state_of(states, i), step + each, own, do.batch_of(batches, i))
        return [do.state_of(states, i) for i in range(len(opened))]


def mapped(one: Callable[[Any], Any], platform: str) -> Callable[[Any], Any]:
    """`one` of every element of a leading axis: of all at once, or, on CPUs, of one after another in the same program.

    A CPU is busy with one seed, and loses by a batch of them: a decoding loop that ends at another time in each selects
    between whole caches in every turn. Eight seeds of width 64 on two busy cores took 6.3 s a step one after another,
    8.1 s at once, 6.4 s in eight runs (up to 48 tokens; with 5 tokens all took 0.6 to 0.7 s). Accelerators were not
    measured; they have room for all, as long as one seed does not fill them.
    """
    return (lambda xs: jax.lax.map(one, xs)) if platform == "cpu" else jax.vmap(one)


class Stopwatch:
    """The time spent in steps, which many runs share: a clock that goes only while they train, and so much slower."""

    def __init__(self, runs: int):
        self._runs, self._seconds = runs, 0.0

    def __call__(self) -> float:
        return self._seconds

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Lets the clock go."""
        start = time.perf_counter()
        yield
        self._seconds += (time.perf_counter() - start) / self._runs


class Programs(NamedTuple):
    """What is compiled, all jitted: states are stacked, take a step, and are looked at one by one, as are batches.

    stack      [state of each seed] -> states
    step       states, which are donated -> (states, metrics, batches), all stacked
    state_of   (states, which) -> state
    batch_of   (batches, which) -> batch
    """

    stack: Callable[[Sequence[TrainState]], TrainState]
    step: Callable[[TrainState], tuple[TrainState, Metrics, Batch]]
    state_of: Callable[[TrainState, int], TrainState]
    batch_of: Callable[[Batch, int], Batch]


def programs(parts: online.Parts, mesh: Mesh, platform: str) -> Programs:
    """Each seed's state is split over the mesh as it is alone; no axis of the mesh splits the seeds."""
    alone = meshes.state_shardings(abstract_state(parts), mesh)
    stacked = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), alone)
    whole, next_prompts = online.whole_program(parts), online.prompt_source(parts)
    one = mapped(lambda state: whole(state, next_prompts(state, state.step)), platform)
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    return Programs(
        stack=jax.jit(lambda states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=stacked),
        step=jax.jit(one, donate_argnums=0, out_shardings=(stacked, None, None)),
        state_of=jax.jit(pick, out_shardings=alone), batch_of=jax.jit(pick),
    )  # fmt: skip


def _common_step(opened: Sequence[runs.Run], states: Sequence[TrainState]) -> int:
    steps = [int(state.step) for state in states]
    if len(set(steps)) > 1:
        found = ", ".join(f"{run.folder.name} {step}" for run, step in zip(opened, steps))
        raise Refused(f"the seeds are at different steps ({found}): remove the checkpoints after step {min(steps)}, or "
                      "train each alone with its own config.gin")  # fmt: skip
    return steps[0]


@contextlib.contextmanager
def _all_before_the_first_stops() -> Iterator[Callable]:
    """What stops one run is raised when all have recorded the step, so that all can go on from the same one."""
    stopped = []

    @contextlib.contextmanager
    def last_word(run: runs.Run) -> Iterator[None]:
        try:
            yield
        except runs.Stopped as error:
            stopped.append(type(error)(f"{run.folder.name}: {error}"))

    yield last_word
    if stopped:
        raise stopped[0]
