"""Experiments so small that a test can run them whole."""

import functools
import json
import pathlib

import jax
import numpy as np

from mlrl import optimizers, runs, selection
from mlrl.evaluation import Evaluation
from mlrl.loops import iterated, online
from mlrl.losses import policy
from mlrl.meshes import mesh
from mlrl.models.transformer import Config
from mlrl.rewards import combinators, graph
from mlrl.rollouts.single_turn import single_turn
from mlrl.tasks import puzzles
from mlrl.types import RewardFn

TIMES = ("seconds/", "tokens_per_second", "compilations")
TINY = Config(width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=24)
ROLLOUT = functools.partial(single_turn, max_completion_tokens=3)
ONE_DEVICE = functools.partial(mesh, devices=1)


def first_digit(completion: str, example) -> float:
    """A host reward that even a random model earns now and then."""
    return float(completion[:1] == example["answer"][:1])


@functools.cache
def noisy_verifier() -> RewardFn:
    """The verifier and a little noise: a reward with a state."""
    return combinators.weighted_sum([graph.arithmetic, graph.random()], [1.0, 0.1])


SUMS = puzzles.arithmetic(digits=1)
HELD_OUT = puzzles.arithmetic(digits=1, split="test", name="held_out")
EVALUATION = Evaluation(HELD_OUT, graph.arithmetic, prompts=8, samples=2, every_steps=8)
ADAMW = optimizers.adamw(learning_rate=3e-3)


def sums(**changes) -> online.Experiment:
    """One-digit sums: 90 training prompts, so that 24 steps of 8 prompts cross two epoch borders."""
    settings = dict(
        task=SUMS, reward_fn=noisy_verifier(), losses=(policy.ppo_clip,), num_steps=24, model=TINY,
        prompts_per_step=8, group_size=4, rollout_fn=ROLLOUT, optimizer=ADAMW,
        minibatches=2, evaluations=(EVALUATION,), mesh=ONE_DEVICE,
        recording=runs.Recording(save_every_steps=6, samples_every_steps=5, samples_rows=2),
    )  # fmt: skip
    return online.Experiment(**{**settings, **changes})


def round_of_sums(**changes) -> iterated.Experiment:
    """The same sums in rounds of 16 prompts x 4 completions, of which the best of each prompt is learned."""
    given = sums()
    shared = ("task", "reward_fn", "model", "rollout_fn", "optimizer", "mesh")
    settings = {name: getattr(given, name) for name in shared}
    settings |= dict(
        num_rounds=5, select_fn=selection.best_of_n, prompts_per_round=16, prompts_per_step=8, group_size=4,
        rows_per_step=12, epochs=2, recording=runs.Recording(save_every_steps=2, samples_every_steps=2, samples_rows=2),
    )  # fmt: skip
    return iterated.Experiment(**{**settings, **changes})


def logged(folder):
    """Every line of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def assert_same(state, other):
    unkeyed = lambda s: jax.tree.leaves(jax.device_get(s.replace(key=jax.random.key_data(s.key))))  # noqa: E731
    for a, b in zip(unkeyed(state), unkeyed(other), strict=True):
        np.testing.assert_array_equal(a, b)
