"""Times rows decoded in refilled slots beside batches of as many rows decoded one after the other, in turns.

    python -m benchmarks.refill        writes REFILL.md beside this file
"""

import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import CONFIG, machine, take_turns
from mlrl import generation
from mlrl.models.transformer import Transformer, initialize
from mlrl.refilled import refilled
from mlrl.types import Prompts

HERE = pathlib.Path(__file__).resolve().parent
SLOTS, CHECK_EVERY_STEPS, PROMPT_TOKENS, REPEATS = 64, 8, 96, 3
GOAL = 1.8  # of the static batches' useful tokens per second, at least


def log_normal(rows, *, mean=24.0, sigma=1.0, most=128):
    """Lengths whose logarithm is normal: half are below 15, one in seventy is above 128."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, rows)
    return np.clip(np.ceil(drawn), 1, most).astype(int)


def recorded():
    """Lengths of completions that models have sampled, the four of each problem in a row."""
    return np.ravel(json.loads(HERE.joinpath("recorded_lengths.json").read_text())["lengths"])


# lengths, group size, completion columns
CASES = {
    "log-normal": (log_normal(256), 8, 128),
    "log-normal, twice the rows": (log_normal(512), 8, 128),
    "recorded": (recorded(), 4, 416),
}


def of_lengths(lengths):
    """`generation.chooser`, but row b ends with its token number lengths[b], whatever the weights say. lengths: [B]."""
    chooser = generation.chooser

    def made(*args):
        choose = chooser(*args)

        def choose_until(hidden, rows, t):
            token, log_prob, _ = choose(hidden, rows, t)
            return token, log_prob, t + 1 >= lengths[jnp.minimum(rows, lengths.size - 1)]

        return choose_until

    return made


def static_steps(lengths, slots):
    """Decode steps of batches of `slots` rows; the first token of a row comes with its prompt."""
    return sum(max(lengths[i : i + slots]) - 1 for i in range(0, len(lengths), slots))


def refilled_steps(lengths, slots, k):
    """Decode steps of `refilled`, by its schedule: after every k, free slots take the next rows in order."""
    left, waiting, steps = np.zeros(slots, int), list(lengths), 0
    while waiting or left.any():
        left = np.asarray([rest or (waiting.pop(0) if waiting else 0) for rest in left])
        left, steps = np.maximum(left - k, 0), steps + k
    return steps


def seconds(lengths, group_size, columns):
    """Seconds of each repeat of both sides; both must make rows of the lengths that are asked for."""
    model, n = Transformer(CONFIG), lengths.size // group_size
    params, zeros = initialize(model, jax.random.key(0)), jnp.zeros(n, jnp.int32)
    tokens = jax.random.randint(jax.random.key(1), (n, PROMPT_TOKENS), 0, CONFIG.vocabulary_size)
    prompts = Prompts(tokens, jnp.ones_like(tokens, bool), zeros, zeros, ())

    def program(sampler, **knobs):
        def run(prompts, lengths, key):
            with mock.patch.object(generation, "chooser", of_lengths(lengths)):
                return sampler(model, params, prompts, key, max_completion_tokens=columns, eos_ids=(-1,), pad_id=0,
                               group_size=group_size, **knobs)  # fmt: skip

        return jax.jit(run)

    static, slots = program(generation.generate), program(refilled, slots=SLOTS, check_every_steps=CHECK_EVERY_STEPS)
    whole = jnp.asarray(lengths)

    def batch(first_row, key):
        first = first_row // group_size
        some = jax.tree.map(lambda x: x[first : first + SLOTS // group_size], prompts)
        return static(some, whole[first_row : first_row + SLOTS], key)

    def batches(repeat):
        return [batch(row, jax.random.key(repeat)) for row in range(0, lengths.size, SLOTS)]

    sides = {"baseline": batches, "mlrl": lambda repeat: [slots(prompts, whole, jax.random.key(repeat))]}
    for run in sides.values():
        assert np.array_equal(np.concatenate([x.action_mask.sum(1) for x in run(0)]), lengths)
    return take_turns(sides, REPEATS)


def main():
    on = machine()
    lines = [
        "# Refilled slots beside static batches (made by `python -m benchmarks.refill`)", "",
        f"Rows of given lengths after prompts of {PROMPT_TOKENS} tokens, d128 x 2, fp32, prefill included. Static:",
        f"batches of {SLOTS} rows, one after the other, each until its longest row ends. Refilled: {SLOTS} slots,",
        f"k = {CHECK_EVERY_STEPS}. Useful tokens per second, medians of {REPEATS} turns. The ratio, with its least and",
        f"largest, is of one turn; the goal is {GOAL}. Steps: how often the model decodes, static and refilled, and so",
        "the ratio if nothing else took time.", "",
        f"{on['device']}, {on['processor']}, {on['cores']} cores, load {on['load_before']:.1f} before; "
        f"Python {on['python']}, jax {on['jax']}.", "",
        "| lengths | rows (groups of) | mean, median, longest | columns | static | refilled | ratio (range) | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (lengths, group_size, columns) in CASES.items():
        found = {side: np.asarray(times) for side, times in seconds(lengths, group_size, columns).items()}
        ratios = found["baseline"] / found["mlrl"]
        static, slots = (lengths.sum() / np.median(found[side]) for side in ("baseline", "mlrl"))
        shape = f"{lengths.mean():.0f}, {np.median(lengths):.0f}, {lengths.max()} | {columns}"
        ratio = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
        few, many = refilled_steps(lengths, SLOTS, CHECK_EVERY_STEPS), static_steps(lengths, SLOTS)
        lines.append(f"| {name} | {lengths.size} ({group_size}) | {shape} | {static:,.0f} | {slots:,.0f} | {ratio} | "
                     f"{many} / {few} = {many / few:.2f} |")  # fmt: skip
        print(lines[-1], flush=True)
    lines += [
        "", "The recorded lengths are those of solutions to GSM8K's problems that 6B and 175B models sampled (Cobbe et",
        "al. 2021), in tokens of GPT-2: `recorded_lengths.json`.",
    ]  # fmt: skip
    HERE.joinpath("REFILL.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
