"""N steps are k + (N - k) steps, bitwise: parameters, optimizer, metrics; also after kill -9 at any moment."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import worlds  # noqa: E402
from worlds import assert_same, logged  # noqa: E402

from mlrl import curricula, runs  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.rewards import graph, lengths  # noqa: E402
from mlrl.tasks import puzzles  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_once")

def train(folder, **changes):
    experiment = worlds.sums(**changes)
    with runs.Run(folder, experiment.recording) as run:
        return online.train(experiment, run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(folder), folder


def test_resuming_is_bitwise_across_epoch_borders(undisturbed, tmp_path):
    state, folder = undisturbed
    assert int(state.step) == 24 and 24 * 8 > 2 * 90, "the run must cross epoch borders"
    train(tmp_path, num_steps=13)
    resumed = train(tmp_path)
    assert_same(state, resumed)
    by_step = {line["step"]: line for line in logged(tmp_path)}
    for line in logged(folder):
        if "eval/held_out/greedy" in line or line["step"] != 13:
            common = line.keys() & by_step[line["step"]].keys()
            assert {k: line[k] for k in common} == {k: by_step[line["step"]][k] for k in common}
    assert [line["step"] for line in logged(tmp_path)] == list(range(25))


@pytest.mark.slow  # pipeline_test resumes with rewards on the host
def test_host_rewards_and_their_state_resume_too(tmp_path):
    whole = train(tmp_path / "whole", reward_fn=worlds.first_digit, num_steps=8, evaluations=())
    train(tmp_path / "parts", reward_fn=worlds.first_digit, num_steps=3, evaluations=())
    assert_same(whole, train(tmp_path / "parts", reward_fn=worlds.first_digit, num_steps=8, evaluations=()))


def test_a_curriculum_and_a_reward_that_adapt_resume_too(tmp_path):
    """DUMP's rows and LASER-D's lengths: saved at step 4, in the middle of a window of three steps."""
    levels = puzzles.arithmetic_levels(digits=(1, 2))
    reward = lengths.laser_d(graph.arithmetic, lower_tokens=1, step_tokens=1, max_tokens=3, every_steps=3)
    adapting = dict(task=levels, reward_fn=reward, curriculum=curricula.dump(window=20), evaluations=(), minibatches=1)
    whole = train(tmp_path / "whole", num_steps=8, **adapting)
    train(tmp_path / "parts", num_steps=4, **adapting)
    assert_same(whole, train(tmp_path / "parts", num_steps=8, **adapting))
    weights = [line["curriculum/plus_2x1"] for line in logged(tmp_path / "parts")[1:]]
    assert weights[0] == 0.5 and len(set(weights)) > 1
    assert int(whole.curriculum["rows"].sum()) == 8 * 32 and int(whole.reward["own"]["calls"]) == 8


def test_kill_9_at_a_random_moment_loses_nothing(undisturbed, tmp_path):
    state, folder = undisturbed
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import worlds; from mlrl import runs; "
        "from mlrl.loops import online; e = worlds.sums()\n"
        f"with runs.Run({str(tmp_path)!r}, e.recording) as run: online.train(e, run)"
    )
    root = HERE.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    chance, kills = random.Random(0), 0
    for _ in range(1):
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
        log = tmp_path / "metrics.jsonl"
        start, target = time.time(), chance.randint(2, 20)
        while process.poll() is None and time.time() - start < 120:
            if log.is_file() and len(log.read_text().splitlines()) > target:
                process.send_signal(signal.SIGKILL)
                kills += 1
            time.sleep(0.003)
        process.wait()
    assert kills, "the run was over before it could be killed"
    assert_same(state, train(tmp_path))
    assert [line["step"] for line in logged(tmp_path)] == [line["step"] for line in logged(folder)]
    assert logged(tmp_path) == logged(folder)
