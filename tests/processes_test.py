"""Runs in several local processes: they equal one process, and outlive SIGTERM and the end of one or all of them."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mlrl import main, meshes, processes, runs
from mlrl.types import Refused

REPO = pathlib.Path(__file__).resolve().parent.parent
REWARD = """
import os, pathlib, time

def odd_sum(completion, example):
    time.sleep(0.02)
    pathlib.Path("asked", str(os.getppid())).open("a").write("x")
    return {"reward": sum(map(ord, completion)) % 7 / 7.0, "outcome": float(completion == example["answer"])}
"""
GIN = """
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
include 'gin/tasks/arithmetic.gin'
import host_reward
from mlrl import evaluation
from mlrl import meshes
from mlrl import runs
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.tasks import puzzles
STEPS = 8
online.Experiment.reward_fn = @host_reward.odd_sum
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 2
online.Experiment.evaluations = (@evaluation.Evaluation(),)
evaluation.Evaluation.task = @puzzles.arithmetic()
evaluation.Evaluation.reward_fn = @host_reward.odd_sum
evaluation.Evaluation.prompts = 8
meshes.mesh.devices = 4
meshes.mesh.data = 2
meshes.mesh.fsdp = 2
runs.Recording.save_every_steps = 1
runs.Recording.phases_every_steps = 0
transformer.Config.width = 16
transformer.Config.layers = 1
transformer.Config.heads = 2
transformer.Config.kv_heads = 1
transformer.Config.head_width = 8
transformer.Config.mlp_width = 24
"""
SAME = ("reward", "accuracy", "loss", "grad_norm", "eval/plus_2x2/greedy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "asked").mkdir()
    (folder / "host_reward.py").write_text(REWARD)
    (folder / "my.gin").write_text(GIN)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def alone(folder):
    """The metrics of the undisturbed run in one process of four devices."""
    assert main.main(["train", "my.gin", "--run_dir", "alone"]) == 0
    found = lines("alone")
    assert all(line["grad_norm"] > 0 for line in found[1:])
    return found


def started(folder, name, count, words=("train", "my.gin", "--run_dir"), own=False):
    """`count` processes of a run, with 4 / count devices each; if `own`, each in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={4 // count} " + " ".join(
        flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)  # fmt: skip
    given = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": flags,
             "PYTHONPATH": os.pathsep.join([str(REPO), str(folder)])}  # fmt: skip
    command = [sys.executable, "-m", "mlrl", *words, name]
    where = [folder / f"disk_{index}" if own else folder for index in range(count)]
    for place in where if own else ():
        (place / "asked").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "my.gin", place)
    return [subprocess.Popen(command, cwd=place, env=os.environ | given | {"JAX_PROCESS_ID": str(index)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for index, place in enumerate(where)]  # fmt: skip


def ended(many, seconds=200):
    """(statuses, what each said) after all have ended."""
    said = [one.communicate(timeout=seconds)[0] for one in many]
    return [one.returncode for one in many], said


def lines(name):
    path = pathlib.Path(name, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for_step(name, step, many):
    deadline = time.monotonic() + 200
    while not any(line["step"] >= step for line in lines(name)):
        assert time.monotonic() < deadline and all(one.poll() is None for one in many), ended(many, 5)
        time.sleep(0.02)


def same(name, alone):
    """Whether a run's logs and last parameters are those of the undisturbed run."""
    found = lines(name)
    assert [line["step"] for line in found] == [line["step"] for line in alone]
    for one, other in zip(found, alone):
        for metric in (m for m in SAME if m in other):
            np.testing.assert_allclose(one[metric], other[metric], rtol=1e-3, atol=1e-5, err_msg=f"{metric} {one}")
    here, there = (last_params(run) for run in (name, "alone"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), here, there)


def last_params(name):
    experiment, _ = main.load("my.gin", {})
    loop, parts = main._prepared(experiment)
    with meshes.use(experiment.mesh()) as mesh:
        return jax.device_get(runs.last_state(pathlib.Path(name), loop.abstract_state(parts), mesh).params)


def test_two_processes_are_one_and_end_together_when_one_is_told_to(folder, alone):
    for path in (folder / "asked").iterdir():
        path.unlink()
    many = started(folder, "two", 2)
    wait_for_step("two", 2, many)
    many[1].send_signal(signal.SIGTERM)
    statuses, said = ended(many)
    assert statuses == [143, 143], said
    assert all("told to end after step" in words and "Traceback" not in words for words in said), said
    asked = [path.stat().st_size for path in (folder / "asked").iterdir()]
    assert len(asked) == 2 and abs(asked[0] - asked[1]) <= 16, "each process judges its own rows"
    step = lines("two")[-1]["step"]
    assert 2 <= step < 8
    assert main.main(["train", "my.gin", "--run_dir", "two"]) == 0  # in one process
    same("two", alone)


def test_processes_with_disks_of_their_own_are_refused(folder):
    statuses, said = ended(started(folder, "own", 2, own=True))
    assert statuses == [2, 2], said
    for words in said:
        (line,) = [line for line in words.splitlines() if line.startswith("mlrl: ")]
        assert "own is not one folder for all processes: process 1 on" in line and "Traceback" not in words
    assert not list(folder.glob("disk_*/own/checkpoints")) and not list(folder.glob("disk_*/own/.seen*"))


def test_what_is_missing_on_one_host_is_said_by_all(folder):
    (folder / "disk_0").mkdir(exist_ok=True)
    (folder / "disk_0" / "their.gin").write_text(GIN)
    statuses, said = ended(started(folder, "missing", 2, words=["train", "their.gin", "--run_dir"], own=True))
    assert statuses == [2, 2], said
    for words in said:
        (line,) = [line for line in words.splitlines() if line.startswith("mlrl: ")]
        assert re.fullmatch("mlrl: process 1 on .*: there is no file their.gin: .*", line) and "Traceback" not in words


def test_two_processes_evaluate_as_one_and_another_mesh_goes_on(folder, alone):
    shutil.copytree("alone", "again")
    results = pathlib.Path("again", "results.json")
    before = json.loads(results.read_text())
    results.unlink()
    statuses, said = ended(started(folder, "again", 2, words=["eval"]))
    assert statuses == [0, 0], said
    assert "written to" in said[0] and "written to" not in said[1]
    assert json.loads(results.read_text())["evaluations"] == [e for e in before["evaluations"] if e["step"] == 8]
    other = ("--gin.STEPS=9", "--gin.meshes.mesh.data=4", "--gin.meshes.mesh.fsdp=1",
             "--gin.online.Experiment.micro_batch_rows=8")  # fmt: skip
    assert main.main(["train", "my.gin", "--run_dir", "again", *other]) == 0
    assert lines("again")[-1]["step"] == 9


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_end_of_one_process_ends_all_and_another_number_goes_on(folder, alone):
    many = started(folder, "four", 4)
    wait_for_step("four", 2, many)
    many[2].kill()
    statuses, said = ended(many)
    assert all(statuses), said
    assert any("mlrl: " in words for words in said), said
    many = started(folder, "four", 2)
    wait_for_step("four", lines("four")[-1]["step"] + 2, many)
    for one in many:
        one.kill()
    ended(many)
    statuses, said = ended(started(folder, "four", 2))
    assert statuses == [0, 0], said
    same("four", alone)


@pytest.mark.slow  # the first test tells two processes to end, loops/seeds_test one
@pytest.mark.timeout(1200)
def test_sigterm_saves_the_last_step_and_the_run_goes_on(folder, alone):
    command = [sys.executable, "-m", "mlrl", "train", "my.gin", "--run_dir", "told"]
    one = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env=os.environ | {"PYTHONPATH": str(REPO)})  # fmt: skip
    wait_for_step("told", 1, [one])
    one.send_signal(signal.SIGTERM)
    statuses, (said,) = ended([one])
    assert statuses == [143] and said.splitlines()[-1].startswith("mlrl: told to end after step"), said
    assert main.main(["train", "my.gin", "--run_dir", "told"]) == 0
    assert [line["loss"] for line in lines("told")[1:]] == [line["loss"] for line in alone[1:]]


@pytest.mark.parametrize("given, words", [
    (dict(JAX_NUM_PROCESSES="2"), "JAX_COORDINATOR_ADDRESS is not: set all three, or none"),
    (dict(JAX_COORDINATOR_ADDRESS="x:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="2"), "the first one below the second"),
    (dict(JAX_COORDINATOR_ADDRESS="x:1", JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0"), "must be whole numbers"),
])  # fmt: skip
def test_an_environment_that_says_too_little_is_refused(monkeypatch, given, words):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=words):
        processes.join()


@pytest.mark.parametrize("error, raised", [
    (ValueError("coordinator_address should be defined."), False),
    (RuntimeError("jax.distributed.initialize() must be called before any JAX calls that might"), False),
    (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
])  # fmt: skip
def test_a_machine_alone_joins_nothing_and_a_cluster_that_fails_is_told(monkeypatch, error, raised):
    def initialize():
        raise error

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(RuntimeError, match="Barrier") if raised else contextlib.nullcontext():
        processes.join()


def test_one_process_alone_has_all_shares():
    processes.join()  # nothing says that there are others
    assert processes.is_first() and processes.in_shares(3, lambda own: [i * i for i in own]) == [0, 1, 4]
    assert processes.by_first(lambda: 7) == 7 and processes.everywhere(lambda: 1) == [1]
    with pytest.raises(Refused, match="no"):
        processes.by_first(lambda: (_ for _ in ()).throw(Refused("no")))
