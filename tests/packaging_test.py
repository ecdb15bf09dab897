"""mlrl as others get it: a wheel that brings its gin library along, and imports that cost nothing until used."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import mlrl

REPO = pathlib.Path(__file__).resolve().parent.parent
HEAVY = ("jax", "flax", "tensorflow", "seqio", "orbax", "matplotlib")


def python(*arguments, cwd, pythonpath):
    """Runs this interpreter on `arguments` and returns what it did; the checkout is on no path but `pythonpath`."""
    # One device, and programs that compile fast: they run for two steps.
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = {**os.environ, "PYTHONPATH": str(pythonpath), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def checked(done):
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder outside of the checkout into which mlrl's wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, target = folder / "source", folder / "wheels", folder / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):  # a copy: building leaves files behind
        shutil.copy(REPO / name, source / name)
    for name in ("mlrl", "gin"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    checked(python(*pip, "wheel", source, *offline, "--no-build-isolation", "-w", wheels, cwd=folder, pythonpath=""))
    (wheel,) = wheels.glob("mlrl-*.whl")
    checked(python(*pip, "install", wheel, *offline, "--target", target, cwd=folder, pythonpath=""))
    return target


def test_the_wheel_holds_every_module_and_the_whole_gin_library(installed):
    modules = {path.relative_to(REPO) for path in (REPO / "mlrl").rglob("*.py")}
    library = {"mlrl" / path.relative_to(REPO) for path in (REPO / "gin").rglob("*.gin")}
    assert library
    assert {path for path in modules | library if not (installed / path).is_file()} == set()


def test_the_command_answers_from_another_folder(installed, tmp_path):
    where = checked(python("-c", "import mlrl; print(mlrl.__file__)", cwd=tmp_path, pythonpath=installed))
    assert pathlib.Path(where.stdout.strip()).is_relative_to(installed)
    words = checked(python("-m", "mlrl", "--help", cwd=tmp_path, pythonpath=installed)).stdout
    assert all(command in words for command in ("train", "eval", "check", "report"))


@pytest.mark.parametrize("arguments", [("-c", "import mlrl; mlrl.__version__, dir(mlrl)"), ("-m", "mlrl", "--help")])
def test_nothing_heavy_is_imported_before_it_is_needed(arguments, tmp_path):
    done = checked(python("-X", "importtime", *arguments, cwd=tmp_path, pythonpath=REPO))
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "mlrl" in imported and imported.isdisjoint(HEAVY)


def test_the_folder_gin_of_the_checkout_does_not_hide_gin_config():
    words = checked(python("-c", "import gin; print(gin.parse_config.__module__)", cwd=REPO, pythonpath=REPO)).stdout
    assert words.strip() == "gin.config"


@pytest.mark.parametrize("name", [name for name in mlrl.__all__ if name != "__version__"])
def test_every_public_name_is_there(name):
    assert getattr(mlrl, name).__module__.startswith("mlrl.")
    assert name in dir(mlrl)


def test_modules_are_found_by_name_and_strangers_are_not():
    assert mlrl.reductions is importlib.import_module("mlrl.reductions")
    assert {"reductions", "losses", "types"} <= set(dir(mlrl))
    with pytest.raises(AttributeError, match="no attribute 'reduction'"):
        mlrl.reduction  # noqa: B018


# What a user writes in a folder of their own: a task, a reward, a curriculum, and a gin file that names them.
MY_TASKS = """
import mlrl
from mlrl.tasks.mixtures import mixture
from mlrl.tasks.tables import table
from mlrl.vocabularies import characters

VOCABULARY = characters("abcdefgh=")


def copying():
    vowels, consonants = ([{"prompt": f"{c}=", "answer": c} for c in letters] for letters in ("ae", "bcdfgh"))
    print("mlrl lies in", mlrl.__file__)
    return mixture([table(vowels, VOCABULARY, name="vowels"), table(consonants, VOCABULARY, name="consonants")],
                   name="copying")
"""

MY_REWARDS = """
def copied(completion, example, *, bonus=0.0):
    return {"reward": bonus + (completion == example["answer"]), "outcome": float(completion == example["answer"])}
"""

MY_CURRICULA = """
import jax.numpy as jnp
from mlrl.types import CurriculumFn


def consonants_only():
    def init(task):
        return jnp.asarray([float(name == "consonants") for name in task.sources])

    return CurriculumFn(init, lambda state: state, lambda state, prompts, batch: state)
"""

MY_GIN = """
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
from mlrl import runs
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rollouts import single_turn
import my_curricula
import my_rewards
import my_tasks

STEPS = 2
online.Experiment.task = @my_tasks.copying()
online.Experiment.reward_fn = @my_rewards.copied
my_rewards.copied.bonus = 0.25
online.Experiment.curriculum = @my_curricula.consonants_only()
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 2
runs.Recording.samples_every_steps = 1
runs.Recording.samples_rows = 16
transformer.Config.width = 16
transformer.Config.layers = 1
transformer.Config.heads = 2
transformer.Config.kv_heads = 1
transformer.Config.head_width = 8
transformer.Config.mlp_width = 24
single_turn.single_turn.max_completion_tokens = 2
"""


def test_a_users_own_modules_are_named_in_their_gin_file_and_train(installed, tmp_path):
    written = {"my_tasks.py": MY_TASKS, "my_rewards.py": MY_REWARDS, "my_curricula.py": MY_CURRICULA, "my.gin": MY_GIN}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    done = checked(python("-m", "mlrl", "train", "my.gin", "--run_dir", "run", cwd=tmp_path, pythonpath=installed))
    assert f"mlrl lies in {installed}" in done.stdout
    run = tmp_path / "run"
    assert {"config.gin", "operative_config.gin", "metrics.jsonl", "samples.jsonl", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 16
    assert {row["prompt"] for row in rows} <= {f"{c}=" for c in "bcdfgh"}  # the curriculum
    for row in rows:  # the reward, and its knob, which a worker process was told
        right = float(row["completion"] == row["prompt"][0])
        assert (row["scored"], row["outcome"], row["reward"]) == (True, right, 0.25 + right)
