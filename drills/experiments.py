"""Gin files for the drill of mutated files: small experiments of three loops, and whether one means what it says."""

from __future__ import annotations

import ast
import contextlib
import io
import pathlib
import re
from typing import Any

from drills import worlds
from mlrl import folders, main
from mlrl.types import Refused

_IN_GRAPH = f"""# Sums, rewarded in the graph, by GRPO.
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
include 'gin/tasks/arithmetic.gin'
from mlrl import evaluation
from mlrl import optimizers
from mlrl import runs
from mlrl import sampling
from mlrl.loops import online
from mlrl.losses import policy
from mlrl.models import transformer
from mlrl.rewards import graph
from mlrl.tasks import puzzles
STEPS = 4
DIGITS = 1
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
online.Experiment.minibatches = 2
online.Experiment.losses = (@policy.ppo_clip,)
policy.ppo_clip.clip_high = 0.28
sampling.Sampling.temperature = 0.9
optimizers.adamw.learning_rate = 1e-3
test/puzzles.arithmetic.split = 'test'
online.Experiment.evaluations = (@test/evaluation.Evaluation(),)
test/evaluation.Evaluation.task = @test/puzzles.arithmetic()
evaluation.Evaluation.reward_fn = @graph.arithmetic
evaluation.Evaluation.prompts = 8
runs.Recording.save_every_steps = 2
{worlds.SHAPE}"""
_OFFLINE = f"""# Demonstrations of sums.
from __gin__ import dynamic_registration
include 'gin/methods/sft.gin'
from mlrl.loops import offline
from mlrl.models import transformer
from mlrl.tasks import puzzles
STEPS = 3
puzzles.arithmetic.digits = 1
offline.Experiment.task = @puzzles.arithmetic()
offline.Experiment.rows_per_step = 8
offline.Experiment.epochs = 1
{worlds.SHAPE}"""
_ITERATED = f"""# Rounds of sums, of which the best are learned.
from __gin__ import dynamic_registration
include 'gin/methods/raft.gin'
from mlrl.loops import iterated
from mlrl.models import transformer
from mlrl.rewards import graph
from mlrl.rollouts import single_turn
from mlrl.tasks import puzzles
puzzles.arithmetic.digits = 1
single_turn.single_turn.max_completion_tokens = 3
iterated.Experiment.task = @puzzles.arithmetic()
iterated.Experiment.reward_fn = @graph.arithmetic
iterated.Experiment.prompts_per_round = 8
iterated.Experiment.prompts_per_step = 4
iterated.Experiment.group_size = 4
iterated.Experiment.rows_per_step = 16
{worlds.SHAPE}"""
TEXTS = {"host": worlds.GIN, "in_graph": _IN_GRAPH, "offline": _OFFLINE, "iterated": _ITERATED}


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """A folder for each experiment."""
    made = []
    for name, text in TEXTS.items():
        made.append(folder / name)
        made[-1].mkdir()
        (made[-1] / "my.gin").write_text(text)
        (made[-1] / "drilled_reward.py").write_text(worlds.REWARD)
    return made


def use(folder: pathlib.Path) -> str:
    """Checks my.gin as `mlrl check` does, then compares what is bound with what the file says.

    Raises: Refused, if the command said one line of a mistake that was foreseen; RuntimeError, if it said more.
    """
    printed, said = io.StringIO(), io.StringIO()
    with worlds.inside(folder):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            status = main.main(["check", "my.gin"])
        if status:
            line = said.getvalue().strip()
            if (status == 2 and line.startswith("mlrl: ") and "\n" not in line
                    and not re.search(r"Traceback|--debug shows the trace|<function | at 0x", line)):  # fmt: skip
                raise Refused(line)
            raise RuntimeError(f"exit status {status}: {line}")
        if not printed.getvalue().strip():
            return "check said nothing"
        return not_as_written("my.gin")


def not_as_written(path: str) -> str:
    """What the experiment binds otherwise than its file says; and whether its configuration means the same again."""
    _, config = main.load(path)
    bound = dict(_bindings(config))
    said = re.split(r"(?m)^include .*$", pathlib.Path(path).read_text())[-1]  # an include binds anew what was before
    for name, value in dict(_bindings(said)).items():
        found = [v for n, v in bound.items() if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")]
        if value not in found:
            return f"{name} is {value} in the file, and {found} in the configuration"
    again = pathlib.Path("again.gin")
    again.write_text(config)
    if main.load(str(again))[1] != config:
        return "its configuration, loaded again, is another one"
    return ""


def _bindings(text: str) -> Any:
    """(name, value) of the statements that bind a literal; the last of a name wins in a dict."""
    for statement in folders.statements(text):
        name, equals, value = statement.partition("=")
        if equals:
            with contextlib.suppress(ValueError, SyntaxError, MemoryError):
                yield name.strip(), repr(ast.literal_eval(value.strip()))
