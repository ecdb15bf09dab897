"""A run learns though some of its host rewards raise, hang or return NaN, and its log says how many."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from drills import worlds
from drills.trials import Drill, Outcome, TrialFn

REASONS = ("raised", "hung", "not_finite")
LEAST_GAIN = 0.15  # of the mean reward, from the first tenth of the steps to the last
SHARES = (0.002, 0.05)  # of the rows, for each reason: 1% of all texts, some of which a policy says more often
GIN = """# One-digit sums from random weights; of the rewards 1% raise, 1% hang and 1% are NaN.
from __gin__ import dynamic_registration
include 'gin/methods/grpo.gin'
include 'gin/tasks/arithmetic.gin'
import broken_reward
from mlrl import optimizers
from mlrl.loops import online
from mlrl.models import transformer
from mlrl.rewards import completions
DIGITS = 1
MAX_COMPLETION_TOKENS = 3
online.Experiment.reward_fn = @completions.per_completion()
completions.per_completion.f = @broken_reward.digits
completions.per_completion.timeout_seconds = 0.3
online.Experiment.prompts_per_step = 16
online.Experiment.group_size = 8
optimizers.adamw.learning_rate = 2e-3
transformer.Config.width = 64
transformer.Config.layers = 1
transformer.Config.mlp_width = 128
"""
REWARD = '''
import time
import zlib


def digits(completion, example):
    """The share of digits in their right place; 1% of texts raise, 1% hang, 1% are NaN, each time they are asked."""
    lot = zlib.crc32(f"{example['prompt']}{completion}".encode()) % 100
    if lot == 0:
        raise ValueError("a broken reward")
    if lot == 1:
        time.sleep(100.0)
    if lot == 2:
        return float("nan")
    answer = example["answer"]
    right = sum(said == wanted for said, wanted in zip(completion, answer))
    return {"reward": right / max(len(completion), len(answer)), "outcome": float(completion == answer)}
'''


@contextlib.contextmanager
def prepared(seed: int, steps: int) -> Iterator[TrialFn]:
    """Writes the experiment and its reward."""
    with tempfile.TemporaryDirectory(prefix="drill-learning-") as name:
        folder = pathlib.Path(name)
        (folder / "my.gin").write_text(GIN)
        (folder / "broken_reward.py").write_text(REWARD)
        start = worlds.starter()

        def trial(number: int) -> Outcome:
            run = f"run{number}"
            process = start(folder, run, f"--gin.STEPS={steps}", f"--gin.SEED={seed + number}")
            process.join()
            said = (folder / f"{run}.log").read_text()
            if process.exitcode:
                return Outcome(f"{steps} steps", "stopped", said[-600:])
            lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "reward" in line]
            tenth = max(1, len(lines) // 10)
            first, last = (float(np.mean([line["reward"] for line in part]))
                           for part in (lines[:tenth], lines[-tenth:]))  # fmt: skip
            shares = {reason: shown(lines, reason) for reason in REASONS}
            wrong = [f"{share:.2%} {reason}" for reason, share in shares.items() if not SHARES[0] <= share <= SHARES[1]]
            wrong += [f"the reward went from {first:.3f} to {last:.3f}"] if last - first < LEAST_GAIN else []
            came = (f"reward {first:.2f} to {last:.2f}, logged as unscored: "
                    + ", ".join(f"{share:.1%} {reason}" for reason, share in shares.items()))  # fmt: skip
            return Outcome(f"{steps} steps", came, "; ".join(wrong))

        yield trial


def shown(lines: list[dict[str, float]], reason: str) -> float:
    """The share of rows that the log says went without a reward for this reason; 0 if it says nothing of it."""
    return float(np.mean([line.get(f"unscored/digits/{reason}", 0.0) for line in lines]))


LEARNING = Drill(
    "learning", "One-digit sums from random weights, rewarded on the host; of the rewards 1% raise, 1% hang and 1% are "
    f"NaN. The mean reward rises by at least {LEAST_GAIN}, and the log says for each of the three how many rows had "
    "none.",
    3, 1, 3600.0, prepared, (150, 60))  # fmt: skip
