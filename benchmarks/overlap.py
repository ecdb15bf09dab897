"""Times whole steps whose rewards wait on the host: one after the other, a step ahead, and on devices of their own.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.overlap     writes OVERLAP.md beside it
"""

import functools
import pathlib
import tempfile
import time

import numpy as np

from benchmarks.measuring import CONFIG, machine, take_turns
from mlrl import meshes, runs
from mlrl.loops import online
from mlrl.losses import policy
from mlrl.rollouts.single_turn import single_turn
from mlrl.tasks import puzzles
from mlrl.types import RewardFn, Rewards

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS, GROUP, TOKENS, REPEATS = 16, 8, 48, 9
FIRST = functools.partial(meshes.mesh, devices=1)
ARMS = {
    "one after the other": {},
    "a step ahead": {"steps_ahead": 1},
    "a step ahead, rollouts on the other device": {"steps_ahead": 1, "rollout_mesh": meshes.others},
}


def waits(seconds):
    """A reward of whole batches on the host that takes so long, as asking a judge elsewhere would: mean token ids."""

    def update(state, rollout, prompts, task, models):
        time.sleep(seconds if isinstance(rollout.tokens, np.ndarray) else 0.0)
        last = np.cumsum(rollout.action_mask, 1) == rollout.action_mask.sum(1, keepdims=True)
        outcome = np.asarray(rollout.tokens.mean(1), np.float32)
        tokens = np.where(last & rollout.action_mask, outcome[:, None], 0.0).astype(np.float32)
        return Rewards(tokens, outcome, np.ones(len(outcome), bool), {"reward": outcome}), state

    return RewardFn(tuple, update, in_graph=False, names=("reward",))


def stepper(folder, wait, changes):
    """step(repeat): one more step of a run of its own."""
    experiment = online.Experiment(
        task=puzzles.arithmetic(digits=2), reward_fn=waits(wait), losses=(policy.ppo_clip,), num_steps=10**6,
        model=CONFIG, prompts_per_step=PROMPTS, group_size=GROUP, micro_batch_rows=16, mesh=FIRST,
        rollout_fn=functools.partial(single_turn, max_completion_tokens=TOKENS), **changes,
    )  # fmt: skip
    parts = online.prepare(experiment)
    compiled, draw = online.jitted(parts), online.prompt_source(parts)
    run = runs.Run(folder, experiment.recording)
    with meshes.use(experiment.mesh()):
        take, held = online.step_function(parts, run, compiled), [online.first_state(parts, compiled)]

    def step(_):
        with meshes.use(experiment.mesh()):
            state = held.pop()
            state, metrics, _ = take(state, draw(state, int(state.step) + experiment.steps_ahead))
            held.append(state)
            return metrics

    return step


def main():
    on = machine()
    lines = [
        "# Host rewards, and rollouts a step ahead (made by `python -m benchmarks.overlap`)", "",
        f"Whole steps of {PROMPTS} prompts x {GROUP} completions of at most {TOKENS} tokens, d128 x 2, fp32, a reward",
        f"that waits on the host for so many seconds; updates on the first device. Medians of {REPEATS} steps of each",
        "arm, taken in turns; the ratio, with its least and largest, is of one turn.", "",
        f"{on['device']}, {on['processor']}, {on['cores']} cores, load {on['load_before']:.1f} before; "
        f"Python {on['python']}, jax {on['jax']}.", "",
        "| the reward waits | step | seconds | ratio to one after the other |", "|---|---|---|---|",
    ]  # fmt: skip
    for wait in (0.0, 0.5, 1.0):
        with tempfile.TemporaryDirectory() as folder:
            steps = {name: stepper(f"{folder}/{i}", wait, changes) for i, (name, changes) in enumerate(ARMS.items())}
            found = {name: np.asarray(seconds) for name, seconds in take_turns(steps, REPEATS).items()}
        for name, seconds in found.items():
            ratios = seconds / found["one after the other"]
            lines.append(f"| {wait:g} s | {name} | {np.median(seconds):.2f} | {np.median(ratios):.2f} "
                         f"({ratios.min():.2f}-{ratios.max():.2f}) |")  # fmt: skip
            print(lines[-1], flush=True)
    HERE.joinpath("OVERLAP.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
