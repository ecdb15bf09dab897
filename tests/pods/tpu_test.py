"""mlrl compile with the compiler for TPUs, where it is installed: `make pods` runs this, on one small topology."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mlrl.costs.chips import CHIPS

REPO = pathlib.Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

TINY = """
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
include 'gin/tasks/arithmetic.gin'
from mlrl import meshes
from mlrl.loops import online
from mlrl.models import transformer
import host_rewards
online.Experiment.reward_fn = @host_rewards.first_digit
online.Experiment.prompts_per_step = 8
online.Experiment.group_size = 2
online.Experiment.mesh = @meshes.mesh
transformer.Config.width = 128
transformer.Config.layers = 1
transformer.Config.heads = 2
transformer.Config.kv_heads = 1
transformer.Config.head_width = 64
transformer.Config.mlp_width = 256
"""
REWARD = "def first_digit(completion, example):\n    return float(completion[:1] == example['answer'][:1])\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(*arguments): what `mlrl compile` on TINY did."""
    folder = tmp_path_factory.mktemp("pods")
    (folder / "my.gin").write_text(TINY)
    (folder / "host_rewards.py").write_text(REWARD)
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "mlrl", "compile", "my.gin", "--topology"]
    return lambda *more: subprocess.run([*command, *more], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_small_topology(run):
    done = run("v5e:2x2", "--json", "-", "--gin.meshes.mesh.data=1", "--gin.meshes.mesh.fsdp=4")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["chips"] == 4 and found["predicted_seconds"] > 0
    programs = {one["program"]: one for one in found["programs"]}
    assert programs.keys() == {"rollout", "update"}
    for one in programs.values():
        assert one["mesh"]["fsdp"] == 4 and 0 < one["spare_bytes"] < CHIPS["v5e"].hbm_bytes
        assert one["compile_seconds"] > 0 and sum(one["flops"].values()) > 0
    update = programs["update"]
    assert update["arguments_bytes"] < 2 * update["state_bytes"]  # a quarter of the state, and rows
    assert sum(update["sent_bytes"].values()) > 0


def test_what_does_not_fit_is_said_in_a_line(run):
    """An MLP of 1.2 billion parameters on every chip, with their Adam moments."""
    done = run("v5e:2x2", "--gin.Config.mlp_width=3000000")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("update")]
    assert "does not fit" in line and "too much" in line
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["v5e:3x3"], "libtpu knows no topology v5e:3x3"),
        (["v5e:2x2", "--gin.meshes.mesh.devices=2"], "mesh has 2 of the 4 devices"),
        (["v5e:4x4"], "do not divide over 16"),
    ],
)
def test_what_the_topology_does_not_fit_is_refused(run, arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stdout + done.stderr
