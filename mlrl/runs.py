"""A run and its folder: what is restored, written down and saved as a loop goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mlrl import checkpoints, folders, meshes, monitoring, processes, profiling, writers
from mlrl.costs.work import Cost
from mlrl.evaluation import Evaluator, Results
from mlrl.models import lora
from mlrl.types import Batch, Metrics, Refused, Task, TrainState, require_whole


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a run writes down.

    save_every_steps      a checkpoint every so many steps, besides the first and the last
    keep_last, keep_best  how many checkpoints stay, of the last and of the best
    best_metric           what the best are the best by: an evaluation's "task/metric"
    samples_every_steps   rows go to samples.jsonl every so many steps
    samples_rows          so many of them
    phases_every_steps    how often the rollout is timed by itself where the whole step is one program; 0: never
    max_bad_updates       updates in a row that may be skipped because they were not finite
    max_unscored_share    the share of a step's rows that may go without a reward
    wandb                 also log to Weights & Biases
    count_flops           log a step's FLOP/s even where the devices' peak is not known; it traces the step once more
    """

    save_every_steps: int = 50
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = ""
    samples_every_steps: int = 10
    samples_rows: int = 8
    phases_every_steps: int = 25
    max_bad_updates: int = 5
    max_unscored_share: float = 0.5
    wandb: bool = False
    count_flops: bool = False

    def __post_init__(self):
        for name in ("save_every_steps", "keep_best", "samples_every_steps", "samples_rows", "phases_every_steps"):
            require_whole("Recording", name, getattr(self, name), 0)
        for name in ("keep_last", "max_bad_updates"):
            require_whole("Recording", name, getattr(self, name), 1)
        if self.keep_best and not self.best_metric:
            raise Refused("Recording.keep_best needs Recording.best_metric, such as 'held_out/greedy'")


class Stopped(RuntimeError):
    """A run that cannot go on, in one line that says why and what was kept."""


class Preempted(Stopped):
    """A run that was told to end (SIGTERM): it saved, and goes on when it is started again."""


class Run:
    """One run's folder while a loop works in it: restores, logs, evaluates and saves.

    In a run of several processes each has one; the first one writes the logs. Steps are timed by the clock `now`.
    """

    def __init__(self, folder: str | pathlib.Path, recording: Recording, *, title: str = "train",
                 now: Callable[[], float] = time.perf_counter,
                 profile: profiling.Steps = profiling.Steps()):  # fmt: skip
        self.folder = pathlib.Path(folder)
        self.recording = recording
        self._title, self._now = title, now
        self._checkpoints = checkpoints.open_manager(
            self.folder / "checkpoints",
            keep_last=recording.keep_last,
            keep_best=recording.keep_best,
            best_metric=recording.best_metric,
        )
        self._phases: dict[str, float] = {}
        self._rehearsed: dict[str, float] = {}
        self._steps, self._rehearsal_compiled = 0, False
        self._state: TrainState | None = None
        self._closers, self._preemption = contextlib.ExitStack(), processes.Preemption()
        self._compiled = profiling.CompileLog(self.folder / "compilations.jsonl")
        self._trace = profiling.Trace(self.folder / "profile", profile)
        self._cost: Cost | None = None

    def __enter__(self) -> Run:
        self._closers.enter_context(self._preemption)
        if processes.is_first():
            self._closers.enter_context(self._compiled.opened())
        self._closers.callback(self._trace.close)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._closers:
            # Several processes save together, and wait for each other; they cannot, if one of them failed alone.
            if jax.process_count() > 1 and kind is not None and not isinstance(error, Stopped):
                return
            self._closers.callback(checkpoints.close, self._checkpoints)
            deleted = any(x.is_deleted() for x in jax.tree.leaves(self._state) if hasattr(x, "is_deleted"))
            if kind is not None and self._state is not None and not deleted:
                self.save(self._state)  # what stopped the run must not cost the steps since the last save

    def restore_or(self, abstract: TrainState, make: Callable[[], TrainState], mesh: Mesh) -> TrainState:
        """The last complete checkpoint, each leaf read to where it lives on the mesh; without one, a fresh state."""
        shardings = meshes.state_shardings(abstract, mesh)
        if checkpoints.latest_step(self.folder / "checkpoints") is None:
            return jax.device_put(make(), shardings)
        return checkpoints.restore(self._checkpoints, _placed(abstract, shardings)).check()

    def begin(self, task: Task, num_steps: int, evaluate: Evaluator, state: TrainState,
              cost: Callable[[], Cost | None] = lambda: None) -> Results:  # fmt: skip
        """Opens the logs at the state's step; before the first step, evaluates and saves.

        Args:
          cost: what a step asks of the devices; called only where it is looked at.
        Returns: the evaluations of the state, those in results.json if the run resumes; {} if there are none.
        """
        self._task, self._num_steps, self._evaluate = task, num_steps, evaluate
        step = self._steps = int(state.step)
        self._writers = writers.open_writers(self.folder, wandb=self.recording.wandb, resume_step=step)
        self._closers.callback(self._writers.close)
        self._bar = writers.progress_bar(num_steps, first_step=step, title=self._title)
        self._closers.callback(self._bar.close)
        results = read_results(self.folder, step)
        if step == 0:
            results = self._evaluated(state, 0)
            self._writers.write(0, _flat(results))
            self.save(state, results)
        if self.recording.count_flops or profiling.peak():
            self._cost = cost()
        self._compiled.step = step
        self._trace.after(step)
        self._clock = self._now()
        return results

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase of the step; logged as seconds/<name>."""
        start = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def rehearse(self, name: str, phase: Callable[[], Any], *, steps: int = 1) -> None:
        """Times one phase of a step that is one program, by running it once more beside the step, when that is due.

        What it makes is thrown away and its time is not counted to the step. Logged as seconds/<name>, and the rest of
        the step as seconds/update. The first rehearsal compiles, so it is run twice. It is due if it is due in any of
        the next `steps` steps.
        """
        every, done, self._steps = self.recording.phases_every_steps, self._steps, self._steps + steps
        if not every or self._steps // every == done // every:
            return
        start = self._now()
        if not self._rehearsal_compiled:
            jax.block_until_ready(phase())
            self._rehearsal_compiled = True
        before = time.perf_counter()
        jax.block_until_ready(phase())
        self._rehearsed[name] = time.perf_counter() - before
        self._clock += self._now() - start

    def save(self, state: TrainState, results: Results | None = None) -> None:
        """Writes a checkpoint of the state, asynchronously, and keeps what the logs say up to it."""
        self._writers.settle()
        checkpoints.save(self._checkpoints, int(state.step), state, _flat(results or {}))

    def record(self, state: TrainState, step: int, metrics: Metrics, batch: Batch) -> Results:
        """Logs a step; evaluates, writes samples and saves when they are due. Returns the evaluations.

        Where K steps were taken at once, `metrics` are [K], of the steps up to `step`, with "bad_updates" among them;
        state and batch are the last one's. Each step gets its line; all else is done after the last.
        """
        self._state = state
        lines = _by_step(jax.device_get({"bad_updates": state.bad_updates} | metrics))
        seconds = (self._now() - self._clock) / len(lines)
        counted = {"seconds/step": seconds, "compilations": monitoring.compilations()}
        for line in lines:
            line |= counted | {"tokens_per_second": line["tokens"] / seconds}
            line |= profiling.shares(self._cost, line, seconds, profiling.peak())
        lines[-1] |= self._timed_phases(seconds, lines[-1]["tokens"])
        lines[-1] |= profiling.bandwidth(self._cost, lines[-1], profiling.peak())
        results = self._evaluated(state, step)
        lines[-1] |= _flat(results)
        for i, line in enumerate(lines, start=step + 1 - len(lines)):
            self._writers.write(i, line)
        self._bar.update(step, lines[-1])
        for i, line in enumerate(lines, start=step + 1 - len(lines)):
            self._require_sense(i, line, step, batch)
        every, last = self.recording, step == self._num_steps
        if every.samples_every_steps and (last or step % every.samples_every_steps == 0):
            self._writers.write_samples(sample_rows(batch, self._task, step, every.samples_rows))
        if last or (every.save_every_steps and step % every.save_every_steps == 0):
            self.save(state, results)
        # Processes agree on the call after which they end, and take calls to be numbered one by one.
        if step < self._num_steps and self._preemption.came(step // len(lines)):
            raise Preempted(f"told to end after step {step}, which is saved in {self.folder}: the same command goes on "
                            "from there")  # fmt: skip
        self._compiled.after(step)
        self._trace.after(step)
        self._clock = self._now()
        return results

    def _timed_phases(self, seconds: float, tokens: float) -> dict[str, float]:
        """Times and speeds of the phases that were timed since the last step, which took so many seconds."""
        phases, self._phases = self._phases, {}
        if self._rehearsed:
            phases = self._rehearsed | {"update": max(seconds - sum(self._rehearsed.values()), 1e-9)}
            self._rehearsed = {}
        times = {f"seconds/{name}": spent for name, spent in phases.items()}
        return times | {f"tokens_per_second/{name}": tokens / spent for name, spent in phases.items()}

    def _require_sense(self, step: int, values: dict[str, float], last_step: int, batch: Batch) -> None:
        """Stops a run whose updates are not finite, or whose rewards or rows are missing; the batch is the last step's.
        """
        if values.get("unreadable_share", 0.0) > 0:
            raise Stopped(f"step {step}: {values['unreadable_share']:.0%} of the rows do not begin with their prompt's "
                          "columns, so their prompts cannot be read once for the group: set Experiment.forward = "
                          "@scoring.whole_rows()")  # fmt: skip
        if values["bad_updates"] >= self.recording.max_bad_updates:
            self._stop(step, last_step, batch, int(values["bad_updates"]))
        if values.get("unscored_share", 0.0) > self.recording.max_unscored_share:
            whose = [name for name in values if name.startswith("unscored/") and values[name] > 0]
            share = f"{values['unscored_share']:.0%}"
            raise Stopped(f"step {step} has no reward for {share} of its rows ({', '.join(whose)}), more than "
                          "Recording.max_unscored_share: mend the reward, then train again from the last "
                          "checkpoint")  # fmt: skip

    def _evaluated(self, state: TrainState, step: int) -> Results:
        if not self._evaluate.due(step, self._num_steps):
            return {}
        results = self._evaluate(lora.policy(state), step, self._num_steps, lora.reference(state))
        if processes.is_first():
            write_results(self.folder, step, results)
        return results

    def _stop(self, step: int, last_step: int, batch: Batch, count: int) -> None:
        dump = self.folder / f"bad_batch_{last_step}.npz"
        leaves = jax.tree_util.tree_leaves_with_path(processes.on_host(batch))
        if processes.is_first():
            np.savez(dump, **{jax.tree_util.keystr(path).strip("."): leaf for path, leaf in leaves})
        raise Stopped(
            f"the loss or its gradient was not finite in {count} updates in a row, up to step {step}: the batch of "
            f"step {last_step} is in {dump}, the parameters of the last good update are in "
            f"{self.folder / 'checkpoints'}/{last_step}"
        )


def _flat(results: Results) -> dict[str, float]:
    return {f"eval/{task}/{name}": r["value"] for task, found in results.items() for name, r in found.items()}


def _by_step(metrics: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics of each step as Python's numbers: of one where they are scalars, of K where they are [K]."""
    columns = {name: np.atleast_1d(value) for name, value in metrics.items()}
    lines = [{name: float(value[i]) for name, value in columns.items()} for i in range(len(columns["bad_updates"]))]
    return [line | {"bad_updates": int(line["bad_updates"])} for line in lines]


def sample_rows(batch: Batch, task: Task, step: int, rows: int) -> list[dict[str, Any]]:
    """Rows from all over a step as plain Python: what the model saw, said and earned, token by token.

    What it was told between two turns is in "observed", by how many tokens of its own it had written before.
    """
    batch, total = processes.on_host(batch), batch.mask.shape[0]
    chosen = np.arange(min(rows, total)) * total // max(1, min(rows, total))  # spread over the groups
    batch = jax.tree.map(operator.itemgetter(chosen), batch)
    samples = []
    for b in range(batch.mask.shape[0]):
        row = jax.tree.map(operator.itemgetter(b), batch)
        said = row.rollout.action_mask
        told = row.rollout.valid & ~said
        before = np.cumsum(said)  # how many tokens of its own each column has before it
        prompt = told & ((before == 0) | ~said.any())
        observed = {int(t): row.rollout.tokens[told & (before == t)] for t in np.unique(before[told & ~prompt])}
        samples.append({
            "step": step,
            "group": int(row.rollout.group),
            "role": int(row.rollout.role),
            "prompt": task.vocabulary.decode(row.rollout.tokens[prompt]),
            "observed": {str(t): task.vocabulary.decode(tokens) for t, tokens in observed.items()},
            "completion": task.vocabulary.decode(row.rollout.tokens[said]),
            "tokens": [task.vocabulary.decode([token]) for token in row.rollout.tokens[said]],
            "log_probs": _plain(row.rollout.behavior_log_probs[said]),
            "advantages": _plain(row.advantages[said]),
            "reward": float(row.rewards.tokens.sum()),
            "outcome": float(row.rewards.outcome),
            "scored": bool(row.rewards.scored),
            "truncated": bool(row.rollout.truncated),
            "parts": {name: float(part) for name, part in row.rewards.parts.items()},
        })  # fmt: skip
    return samples


def _plain(x: np.ndarray) -> list[float]:
    return [round(float(v), 5) for v in x]


def read_results(folder: pathlib.Path, step: int) -> Results:
    """The evaluations that results.json holds of a step."""
    return {entry["task"]: entry["metrics"] for entry in _entries(folder) if entry["step"] == step}


def write_results(folder: pathlib.Path, step: int, results: Results) -> None:
    """Adds evaluations to results.json: those of later steps go, and those of the same tasks at the same step."""
    known = [e for e in _entries(folder) if e["step"] < step or (e["step"] == step and e["task"] not in results)]
    known += [{"step": step, "task": task, "metrics": found} for task, found in results.items()]
    folders.write_atomically(folder / "results.json", json.dumps({"evaluations": known}, indent=1))


def _entries(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "results.json"
    return json.loads(path.read_text())["evaluations"] if path.is_file() else []


def require_checkpoint(folder: pathlib.Path) -> None:
    """Raises Refused unless the run has a complete checkpoint."""
    if checkpoints.latest_step(folder / "checkpoints") is None:
        raise Refused(f"{folder} has no complete checkpoint: train it first, or name another run folder")


def _placed(abstract: TrainState, shardings: TrainState) -> TrainState:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def last_state(folder: pathlib.Path, abstract: TrainState, mesh: Mesh) -> TrainState:
    """The state in the last complete checkpoint of a run, each leaf read to where it lives; writes nothing."""
    manager = checkpoints.open_manager(folder / "checkpoints", read_only=True)
    state = checkpoints.restore(manager, _placed(abstract, meshes.state_shardings(abstract, mesh)))
    checkpoints.close(manager)
    return state


def evaluate_run(folder: str | pathlib.Path, experiment: Any, loop: Any, *, task: str = "", prompts: int = 0,
                 samples: int = 0) -> Results:  # fmt: skip
    """Evaluates the last checkpoint of a run and adds the results to its results.json.

    Args:
      folder: the run's folder.
      experiment: as its config.gin describes it.
      loop: the module of its loop.
      task: only the evaluation of the task of this name; "" measures all.
      prompts, samples: instead of the experiment's own numbers; 0 keeps them.
    Raises: Refused, if there is no checkpoint, or the experiment names no evaluation, or none of that task.
    """
    folder = pathlib.Path(folder)
    if not experiment.evaluations:
        raise Refused(f"{folder}/config.gin names no evaluation: set Experiment.evaluations")
    require_checkpoint(folder)
    changed = {name: value for name, value in (("prompts", prompts), ("samples", samples)) if value}
    known_by = lambda e: {name: value for name, value in changed.items() if hasattr(e, name)}  # noqa: E731
    chosen = [e for e in experiment.evaluations if task in ("", e.task.name)]
    evaluations = tuple(dataclasses.replace(e, **known_by(e)) for e in chosen)
    if not evaluations:
        known = ", ".join(e.task.name for e in experiment.evaluations)
        raise Refused(f"{folder}/config.gin has no evaluation of the task {task!r}: it has {known}")
    parts = loop.prepare(experiment)
    with meshes.use(experiment.mesh()) as mesh:
        state = last_state(folder, loop.abstract_state(parts), mesh)
        step = int(state.step)
        evaluate = loop.evaluator(parts, evaluations)
        results = evaluate(lora.policy(state), step, step, lora.reference(state))
    if processes.is_first():
        write_results(folder, step, results)
    return results
