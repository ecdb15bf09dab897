"""Every gin file parses, is wholly used, and runs one tiny step."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import pytest

from mlrl import main, meshes, runs
from mlrl.loops.start import random_parameters
from mlrl.models.transformer import Config
from mlrl.types import Refused

REPO = pathlib.Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
EXPERIMENTS = sorted(path.relative_to(REPO).as_posix() for path in REPO.glob("experiments/**/*.gin"))
METHODS = sorted(path.stem for path in REPO.glob("gin/methods/*.gin"))
FILES = sorted(path.relative_to(REPO).as_posix() for path in REPO.glob("gin/**/*.gin")) + EXPERIMENTS
LOADED_QUICKLY = {f"experiments/{name}.gin" for name in
                  ("quickstart/grpo", "quickstart/random_reward", "preferences/dpo", "preferences/reward_model")}
# make test-all runs them all
RUN_QUICKLY = {"experiments/quickstart/grpo.gin", "experiments/preferences/dpo.gin", "ppo_shared", "kto"}

WITH_VALUES = {"ppo", "ppo_shared", "reward_model", "process_reward_model"}

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

ONLINE = """from __gin__ import dynamic_registration
include 'gin/methods/{method}.gin'
include 'gin/tasks/arithmetic.gin'
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import graph
DIGITS = 1
MAX_COMPLETION_TOKENS = 3
online.Experiment.reward_fn = @graph.random()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 4
"""
OFFLINE = """from __gin__ import dynamic_registration
include 'gin/methods/{method}.gin'
from mlrl.loops import offline
from mlrl.models import transformer
from mlrl.tasks import pairs
from mlrl.tasks import puzzles
puzzles.arithmetic.digits = 1
pairs.against_corrupted.task = @puzzles.arithmetic()
offline.Experiment.task = @pairs.against_corrupted()
offline.Experiment.rows_per_step = 8
"""
SMALL = dict(width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24)
SHAPE = "".join(f"transformer.Config.{name} = {value}\n" for name, value in SMALL.items())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


def overrides_for(path):
    """The values that an experiment asks for: real data beside the checkout."""
    text = (REPO / path).read_text()
    asked = re.findall(r"^(\w+) = %gin.REQUIRED", text, re.M)
    where = {"DATA": DATA / pathlib.Path(path).parent.name, "VOCAB": DATA / "tokenizers" / "gpt2"}
    for name in asked:
        if not where[name].is_dir():
            pytest.skip(f"{path} needs {name}, and there is no folder {where[name]}")
    return {name: str(where[name]) for name in asked}


def prepared(path, overrides=None, **changes):
    """(experiment, loop): loaded, checked, traced, and every binding used. On one device."""
    experiment, _ = main.load(str(path), overrides)
    experiment = dataclasses.replace(experiment, mesh=functools.partial(meshes.data_mesh, devices=1), **changes)
    loop, _ = main._prepared(experiment)
    return experiment, loop


def one_step(experiment, loop, folder):
    """The metrics of the first step of a real run."""
    experiment = dataclasses.replace(
        experiment, num_steps=1, recording=runs.Recording(save_every_steps=0, samples_rows=1)
    )
    with runs.Run(folder, experiment.recording) as run:
        state = loop.train(experiment, run)
    assert int(state.step) == 1 and int(state.bad_updates) == 0
    lines = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(lines[-1]["loss"]) and math.isfinite(lines[-1]["grad_norm"])
    return lines[-1]


@pytest.mark.parametrize("path", [path if path in LOADED_QUICKLY else slow(path) for path in EXPERIMENTS])
def test_an_experiment_is_wholly_used(path):
    prepared(path, overrides_for(path))


@pytest.mark.parametrize("path", [path if path in RUN_QUICKLY else slow(path) for path in EXPERIMENTS])
def test_an_experiment_runs_a_tiny_step(path, tmp_path):
    """Its own task, rewards and method, with a smaller model, fewer rows, random first weights and no evaluations."""
    experiment, loop = prepared(path, overrides_for(path))
    sizes = {"prompts_per_step": 2, "group_size": 2} if hasattr(experiment, "group_size") else {"rows_per_step": 4}
    tiny = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, **SMALL), start=random_parameters, minibatches=1,
        evaluations=(), **sizes,
    )  # fmt: skip
    one_step(tiny, loop, tmp_path)


def compose(method, folder):
    """A gin file of a method and a tiny task."""
    includes = (REPO / "gin" / "methods" / f"{method}.gin").read_text()
    body = OFFLINE if "gin/loops/offline.gin" in includes else ONLINE
    path = folder / f"{method}.gin"
    path.write_text(body.format(method=method) + SHAPE)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_wholly_used(method, tmp_path):
    experiment, _ = prepared(compose(method, tmp_path))
    assert experiment.model == Config(**SMALL, value_head=method in WITH_VALUES)


@pytest.mark.parametrize("method", [method if method in RUN_QUICKLY else slow(method) for method in METHODS])
def test_a_method_learns_from_a_step(method, tmp_path):
    """With random rewards there is something to learn in every step."""
    assert one_step(*prepared(compose(method, tmp_path)), tmp_path / "run")["grad_norm"] > 0


def test_a_method_that_asks_for_too_much_is_refused(tmp_path):
    path = compose("ppo_shared", tmp_path)
    path.write_text(path.read_text() + "transformer.Config.value_head = False\n")
    with pytest.raises(Refused, match="no value head"):
        prepared(path)
    path = compose("dapo", tmp_path)
    path.write_text(path.read_text() + "from mlrl.losses import policy\npolicy.gspo.clip_high = 0.1\n")
    with pytest.raises(Refused, match="nothing uses the binding mlrl.losses.policy.gspo.clip_high"):
        prepared(path)


@pytest.mark.parametrize("path", FILES)
def test_a_file_uses_what_it_imports_and_says_what_it_is(path):
    lines = (REPO / path).read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says what the file is"
    bindings = "\n".join(line for line in lines if not line.startswith(("#", "from ", "import ", "include ")))
    for line in lines:
        if line.startswith(("from mlrl", "import ")):
            name = line.split()[-1]
            assert re.search(rf"\b{name}\.", bindings), f"{path} imports {name} and does not name it"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_short(method):
    lines = (REPO / "gin" / "methods" / f"{method}.gin").read_text().splitlines()
    parts = [line for line in lines if line and not line.startswith(("#", "from ", "import ", "include "))]
    assert len(parts) <= 10, "a method is an include and the parts that differ"
