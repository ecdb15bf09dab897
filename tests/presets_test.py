"""What each library means by GRPO, through its gin file: advantages to the printed digits, averages, KL and clips."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from rewarded_rows import build

from mlrl import main, reductions, updates
from mlrl.types import Scores

REPO = pathlib.Path(__file__).resolve().parent.parent
MASK = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]], bool)
LENGTHS = MASK.sum(axis=1)
K3 = 0.71828  # of a log-prob of -1 under a reference log-prob of 0

# rewards [1, 0, 0, 0]: the first row's advantage, the others', digits, k3's coefficient, a ratio of 4 counts as
PRESETS = {
    "grpo": (1.499997, -0.499999, 6, 0.0, 4.0),
    "grpo_trl": (1.4997, -0.4999, 4, 0.0, 4.0),
    "grpo_verl": (1.499997, -0.499999, 6, 0.001, 3.0),
    "grpo_openrlhf": (1.5, -0.5, 6, 0.001, 4.0),
    "grpo_nemo_rl": (1.0, -0.577, 3, 0.01, 4.0),
    "grpo_open_instruct": (1.732, -0.577, 3, 0.05, 4.0),
    "dr_grpo": (0.75, -0.25, 6, 0.0, 4.0),
    "maxrl": (3.0, -1.0, 4, 0.0, 4.0),
}
DENOMINATOR = {"dr_grpo": 5 * 4}  # the longest completion times the rows; everywhere else the tokens
FILE = """from __gin__ import dynamic_registration
include 'gin/methods/{}.gin'
include 'gin/tasks/arithmetic.gin'
"""


@pytest.fixture(params=PRESETS)
def preset(request, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    path = tmp_path / "preset.gin"
    path.write_text(FILE.format(request.param))
    return request.param, main.load(str(path))[0]


def rows(rewards, **arrays):
    return build(MASK, rewards, group=[0] * 4, **arrays)


def advantages(experiment, batch):
    return np.asarray(experiment.advantage_fn(batch)[0])


def total(experiment, log_probs, old=0.0, reference=0.0):
    """The loss of rewards [1, 0, 0, 0] with the given log-probs, the same for every token."""
    constant = lambda x: np.full(MASK.shape, x, np.float32)
    batch = rows([1, 0, 0, 0], old_log_probs=constant(old), reference_log_probs=constant(reference))
    batch = batch.replace(advantages=experiment.advantage_fn(batch)[0])
    batch = batch.replace(mask=batch.mask & experiment.select_fn(batch)[:, None])
    batch = batch.replace(weights=experiment.reduction(batch.mask), token_weights=reductions.token_mean(batch.mask))
    log_probs = jnp.asarray(constant(log_probs))
    return float(updates.total_loss(experiment.losses, Scores(log_probs, log_probs, log_probs), batch)[0])


def test_rewards_1_0_0_0(preset):
    name, experiment = preset
    first, rest, digits, _, _ = PRESETS[name]
    found = advantages(experiment, rows([1, 0, 0, 0]))
    np.testing.assert_allclose(np.round(found[0, MASK[0]], digits), first, atol=1e-6)
    for row in (1, 2, 3):
        np.testing.assert_allclose(np.round(found[row, MASK[row]], digits), rest, atol=1e-6)


def test_equal_rewards_teach_nothing(preset):
    _, experiment = preset
    np.testing.assert_array_equal(advantages(experiment, rows([0.3] * 4)), np.zeros(MASK.shape))


def test_a_row_without_company(preset):
    name, experiment = preset
    batch = build(MASK, [2, 0, 1, 1], group=[3, 0, 0, 0])
    expected = 2.0 if name == "grpo_verl" else 0.0  # verl keeps the raw score
    np.testing.assert_array_equal(advantages(experiment, batch)[0, MASK[0]], expected)


def test_the_average_over_tokens(preset):
    """On-policy the loss is minus the average advantage: two, one, two and two tokens."""
    name, experiment = preset
    first, rest, digits, _, _ = PRESETS[name]
    expected = -(first * LENGTHS[0] + rest * LENGTHS[1:].sum()) / DENOMINATOR.get(name, LENGTHS.sum())
    assert total(experiment, -1.0, old=-1.0, reference=-1.0) == pytest.approx(expected, abs=10.0**-digits)


def test_the_kl_in_the_loss(preset):
    name, experiment = preset
    coefficient = PRESETS[name][3]
    difference = total(experiment, -1.0, old=-1.0, reference=0.0) - total(experiment, -1.0, old=-1.0, reference=-1.0)
    assert difference == pytest.approx(coefficient * K3, abs=1e-6)


def test_a_ratio_of_four(preset):
    """Good tokens are clipped at 1 + clip_high; bad ones count four times, or three with the dual clip."""
    name, experiment = preset
    first, rest, digits, _, bad = PRESETS[name]
    good = 1.272 if name == "grpo_open_instruct" else 1.2
    sums = good * first * LENGTHS[0] + bad * rest * LENGTHS[1:].sum()
    expected = -sums / DENOMINATOR.get(name, LENGTHS.sum())
    found = total(experiment, -1.0, old=-1.0 - np.log(4.0), reference=-1.0)
    assert found == pytest.approx(expected, abs=4 * 10.0**-digits)
