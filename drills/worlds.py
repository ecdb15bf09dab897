"""What drills train: a run so small that it is over in seconds, with host rewards, a curriculum and checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mlrl import main, meshes, runs

TIMES = ("seconds/", "tokens_per_second", "compilations")
SHAPE = """
from mlrl import meshes
meshes.mesh.devices = 1
transformer.Config.width = 16
transformer.Config.layers = 1
transformer.Config.heads = 2
transformer.Config.kv_heads = 1
transformer.Config.head_width = 8
transformer.Config.mlp_width = 24
"""
GIN = f"""# Sums of one and of two digits, drawn by a curriculum that adapts, rewarded on the host.
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
import drilled_reward
from mlrl import curricula
from mlrl import runs
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rollouts import single_turn
from mlrl.tasks import puzzles
STEPS = 24
puzzles.arithmetic_levels.digits = (1, 2)
online.Experiment.task = @puzzles.arithmetic_levels()
online.Experiment.reward_fn = @drilled_reward.digits
online.Experiment.curriculum = @curricula.dump()
curricula.dump.window = 20
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
single_turn.single_turn.max_completion_tokens = 4
runs.Recording.save_every_steps = 3
runs.Recording.keep_last = 3
{SHAPE}"""
REWARD = '''
def digits(completion, example):
    """The share of digits that are right."""
    right = sum(a == b for a, b in zip(completion, example["answer"]))
    return {"reward": right / len(example["answer"]), "outcome": float(completion == example["answer"])}
'''
_PRELOADED = ("gin", "mlrl.main", "mlrl.loops.online", "mlrl.curricula", "mlrl.tasks.puzzles", "mlrl.evaluation",
              "mlrl.rewards.completions", "mlrl.runs", "orbax.checkpoint")  # fmt: skip


@contextlib.contextmanager
def inside(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Works in a folder whose modules can be imported, as the command line does."""
    folder, path = pathlib.Path(folder), list(sys.path)
    with contextlib.chdir(folder):
        sys.path.insert(0, str(folder))
        try:
            yield folder
        finally:
            sys.path[:] = path


def write(folder: pathlib.Path) -> None:
    """The files of the experiment."""
    (folder / "my.gin").write_text(GIN)
    (folder / "drilled_reward.py").write_text(REWARD)


def starter() -> Any:
    """start(folder, name, *arguments) -> a process that trains the folder's my.gin into the run folder `name`.

    It is a fork of a process that has imported mlrl and done nothing else, which saves the seconds of importing; it
    says what it says into `name`.log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))

    def start(folder: pathlib.Path, name: str, *arguments: str) -> Any:
        process = context.Process(target=_train, args=(str(folder), name, arguments))
        process.start()
        return process

    return start


def _train(folder: str, name: str, arguments: tuple[str, ...]) -> None:
    log = os.open(f"{folder}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.exit(main.main(["train", "my.gin", "--run_dir", name, *arguments]))


def reader(folder: pathlib.Path) -> Any:
    """read(run folder) -> (leaves of its last checkpoint as numpy arrays, its metrics without what a clock says)."""
    with inside(folder):
        experiment, _ = main.load("my.gin")
        loop, parts = main._prepared(experiment)
    abstract = loop.abstract_state(parts)

    def read(run: pathlib.Path) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
        with meshes.use(experiment.mesh()) as mesh:
            state = runs.last_state(run, abstract, mesh)
        leaves = jax.device_get(jax.tree.leaves(state.replace(key=jax.random.key_data(state.key))))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return leaves, [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]

    return read


def difference(found: Any, wanted: Any) -> str:
    """What differs, bit by bit, between two runs that `read` has read; nothing if they are the same."""
    for number, (a, b) in enumerate(zip(found[0], wanted[0], strict=True)):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            return f"leaf {number} of the last state is not that of the undisturbed run"
    if [line["step"] for line in found[1]] != [line["step"] for line in wanted[1]]:
        return f"metrics.jsonl has the steps {[line['step'] for line in found[1]]}"
    for one, other in zip(found[1], wanted[1]):
        differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        if differing:
            return f"step {one['step']} of metrics.jsonl has another {differing[0]}"
    return ""


def traced(log: pathlib.Path) -> str:
    """What is wrong with what a process said: a trace, or an error that nobody foresaw."""
    said = log.read_text() if log.is_file() else ""
    for words in ("Traceback (most recent", "--debug shows the trace"):
        if words in said:
            return f"it said {words!r}: {said[-600:]}"
    return ""


def trainer(folder: pathlib.Path) -> Any:
    """train(name): trains the folder's my.gin in this process, into the run folder `name`."""
    def train(name: str) -> None:
        said = io.StringIO()
        with inside(folder), contextlib.redirect_stderr(said):
            status = main.main(["train", "my.gin", "--run_dir", name])
        if status:
            raise RuntimeError(f"exit status {status}: {said.getvalue()[-600:]}")

    return train
