"""Seeds and settings of one online experiment, trained by one compiled step; each is a run with its own folder."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlrl import chunks, meshes, runs
from mlrl.loops import dispatch, merged, online, stages
from mlrl.loops.states import abstract_state, initial_state
from mlrl.types import Array, Batch, Metrics, Refused, TrainState, require_whole


def fits(parts: Any, count: int, setting: str = "") -> None:
    """Whether `count` seeds of a prepared experiment can be one program, and its settings, of which `setting` is one.
    Raises Refused.
    """
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
    if alone and setting:
        raise Refused(f"a sweep cannot be trained by one program, since {alone}: leave out --sweep, and train its "
                      f"settings one after another, as by --gin.{setting.replace(',', ' --gin.')}")  # fmt: skip
    if alone:
        first = experiment.seed
        raise Refused(f"{count} seeds cannot be trained by one program, since {alone}: leave out --seeds, and train "
                      f"them one after another, by --gin.SEED={first} to --gin.SEED={first + count - 1}")  # fmt: skip


class Variant(NamedTuple):
    """One setting of an experiment, with its seeds.

    parts        of any of the experiments
    experiments  alike but for their seeds and what those make of the first parameters
    folders      their run folders
    bound        what to be in while any of the setting's functions run or are traced: a configuration, say
    name         the setting in words, such as LEARNING_RATE=1e-4
    """

    parts: online.Parts
    experiments: Sequence[online.Experiment]
    folders: Sequence[pathlib.Path]
    bound: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    name: str = ""

    def alone(self) -> list[online.Parts]:
        """The parts of each seed."""
        return [dataclasses.replace(self.parts, experiment=experiment) for experiment in self.experiments]


def train(variants: Sequence[Variant]) -> list[TrainState]:
    """Trains the seeds of all variants by one program, each in its run folder. Returns their last states, in order.

    Every one is the run that `online.train` makes of it, up to rounding: it draws its own prompts, samples with its
    own randomness, and is saved, logged and evaluated by itself. Whatever stops one stops all, after the same step.
    A run's seconds are its share of the time of all.

    Variants may differ in numbers: see loops.merged.

    Raises: Refused, if variants are not one program, or folders hold different steps.
    """
    variants = _settled(variants)
    first, folders = variants[0].parts.experiment, [folder for v in variants for folder in v.folders]
    watch, each = Stopwatch(len(folders)), first.steps_per_dispatch
    with contextlib.ExitStack() as stack, meshes.use(first.mesh()) as mesh:
        do = programs(variants, mesh, mesh.devices.flat[0].platform)
        opened, bound, alone = [], [], []
        for owner, own in [(variant, own) for variant in variants for own in variant.alone()]:
            experiment = own.experiment
            title = f"{owner.name} seed {experiment.seed}".strip()
            run = runs.Run(folders[len(opened)], experiment.recording, title=title, now=watch)
            opened.append(stack.enter_context(run))
            bound.append(owner.bound)
            with owner.bound():
                alone.append(run.restore_or(abstract_state(own), lambda own=own: initial_state(own), mesh))
        start = _common_step(opened, alone)
        dispatch.can_start(start, each)
        _begin(variants, opened, alone)
        states = do.stack(alone)
        del alone
        for step in range(start, first.num_steps, each):
            with watch.running():
                states, metrics, batches = do.step(states)
                metrics = jax.device_get(metrics)
            with _all_before_the_first_stops() as last_word:
                for i, run in enumerate(opened):
                    with last_word(run), bound[i]():
                        own = jax.tree.map(operator.itemgetter(i), metrics)
                        run.record(do.state_of(states, i), step + each, own, do.batch_of(batches, i))
        return [do.state_of(states, i) for i in range(len(opened))]


def _settled(variants: Sequence[Variant]) -> list[Variant]:
    """The variants with the sizes that the first run has, or finds; all others write down the same."""
    first, folders = variants[0], [folder for variant in variants for folder in variant.folders]
    with meshes.use(first.parts.experiment.mesh()), first.bound():
        settled = online.settled(first.parts, folders[0])
    if settled is first.parts:
        return list(variants)
    for folder in folders[1:]:
        chunks.copy(folders[0], folder)
    sizes = {name: getattr(settled.experiment, name) for name in chunks.Sizes._fields}
    with_ = lambda experiment: dataclasses.replace(experiment, **sizes)  # noqa: E731
    return [
        variant._replace(
            parts=dataclasses.replace(variant.parts, experiment=with_(variant.parts.experiment)),
            experiments=[with_(experiment) for experiment in variant.experiments])
        for variant in variants
    ]  # fmt: skip


def _begin(variants: Sequence[Variant], opened: Sequence[runs.Run], states: Sequence[TrainState]) -> None:
    """Opens the logs of every run; the seeds of a variant share what evaluates them."""
    rest = iter(zip(opened, states, strict=True))
    for variant in variants:
        parts, experiment = variant.parts, variant.parts.experiment
        with variant.bound():
            evaluate = stages.evaluator(parts, experiment.evaluations)
            for own, (run, state) in zip(variant.experiments, rest):
                run.begin(own.task, experiment.num_steps, evaluate, state)


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


def programs(variants: Sequence[Variant], mesh: Mesh, platform: str) -> Programs:
    """Each run's state is split over the mesh as it is alone; no axis of the mesh splits the runs."""
    state = abstract_state(variants[0].parts)
    alone = meshes.state_shardings(state, mesh)
    stacked = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), alone)
    one, numbers = _one_program(variants, state)
    which = np.repeat(np.arange(len(variants)), [len(variant.folders) for variant in variants])
    numbers = [np.asarray(x)[which] for x in numbers]
    one = mapped(one, platform)
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    return Programs(
        stack=jax.jit(lambda states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=stacked),
        step=jax.jit(lambda states: one((numbers, states)), donate_argnums=0, out_shardings=(stacked, None, None)),
        state_of=jax.jit(pick, out_shardings=alone), batch_of=jax.jit(pick),
    )  # fmt: skip


def _one_program(variants: Sequence[Variant], state: TrainState) -> tuple[Callable, list[Array]]:
    """A step as a function of (a variant's numbers, state), and the numbers of all variants. Raises Refused."""
    def step_of(parts: online.Parts) -> Callable:
        whole, next_prompts = online.whole_program(parts), online.prompt_source(parts)
        return lambda state: whole(state, next_prompts(state, state.step))

    if len(variants) == 1:
        alone = step_of(variants[0].parts)
        return lambda given: alone(given[1]), []
    traced = []
    for variant in variants:
        jax.clear_caches()  # what was traced with the numbers of another
        with variant.bound(), _not_one(variants):
            for name in ("num_steps", "steps_per_dispatch", "recording"):
                if getattr(variant.parts.experiment, name) != getattr(variants[0].parts.experiment, name):
                    raise merged.Differs(f"Experiment.{name} is not the same")
            own = abstract_state(variant.parts)
            if jax.tree.structure(own) != jax.tree.structure(state) or jax.tree.leaves(own) != jax.tree.leaves(state):
                raise merged.Differs("their states are of different shapes")
            traced.append(jax.make_jaxpr(step_of(variant.parts), return_shape=True)(state))
    results = jax.tree.structure(traced[0][1])
    with _not_one(variants):
        if any(jax.tree.structure(result) != results for _, result in traced):
            raise merged.Differs("they log different numbers")
        function, numbers = merged.merged([program for program, _ in traced])

    def one(given: tuple[list[Array], TrainState]) -> Any:
        with _not_one(variants):
            return jax.tree.unflatten(results, function(given[0], *jax.tree.leaves(given[1])))

    return one, numbers


@contextlib.contextmanager
def _not_one(variants: Sequence[Variant]) -> Iterator[None]:
    try:
        yield
    except merged.Differs as difference:
        names = " and ".join(variant.name for variant in variants)
        raise Refused(f"{names} are not one program, since {difference}: give --sweep numbers that leave shapes and "
                      "parts as they are, or train them one after another, by --gin.NAME=VALUE") from difference


def _common_step(opened: Sequence[runs.Run], states: Sequence[TrainState]) -> int:
    steps = [int(state.step) for state in states]
    if len(set(steps)) > 1:
        found = ", ".join(f"{_short(run)} {step}" for run, step in zip(opened, steps))
        raise Refused(f"the runs are at different steps ({found}): remove the checkpoints after step {min(steps)}, or "
                      "train each alone with its own config.gin")  # fmt: skip
    return steps[0]


def _short(run: runs.Run) -> str:
    """seed_0, or LEARNING_RATE=1e-4/seed_0."""
    around = run.folder.parent.name
    return f"{around}/{run.folder.name}" if "=" in around else run.folder.name


@contextlib.contextmanager
def _all_before_the_first_stops() -> Iterator[Callable]:
    """What stops one run is raised when all have recorded the step, so that all can go on from the same one."""
    stopped = []

    @contextlib.contextmanager
    def last_word(run: runs.Run) -> Iterator[None]:
        try:
            yield
        except runs.Stopped as error:
            stopped.append(type(error)(f"{_short(run)}: {error}"))

    yield last_word
    if stopped:
        raise stopped[0]
