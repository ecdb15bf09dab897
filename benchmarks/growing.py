"""Times rows decoded over caches that grow beside caches of full length, in turns.

    python -m benchmarks.growing       writes GROWING.md beside this file
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import CONFIG, machine, take_turns
from mlrl.generation import generate
from mlrl.models.transformer import Transformer, initialize
from mlrl.types import Prompts

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS, GROUP, PROMPT_TOKENS, GROW_AT, REPEATS = 16, 4, 16, (64, 128, 256, 512), 5


def seconds(columns):
    """Seconds of each repeat of both samplers, which must sample the same tokens; every row goes on to its last."""
    model = Transformer(CONFIG)
    params, zeros = initialize(model, jax.random.key(0)), jnp.zeros(PROMPTS, jnp.int32)
    tokens = jax.random.randint(jax.random.key(1), (PROMPTS, PROMPT_TOKENS), 0, CONFIG.vocabulary_size)
    prompts = Prompts(tokens, jnp.ones_like(tokens, bool), zeros, zeros, ())
    knobs = dict(max_completion_tokens=columns, eos_ids=(-1,), pad_id=0, group_size=GROUP)
    sample = functools.partial(generate, model, **knobs)
    programs = {"full": jax.jit(sample), "growing": jax.jit(functools.partial(sample, grow_at=GROW_AT))}
    sides = {name: lambda repeat, run=run: run(params, prompts, jax.random.key(repeat)).tokens
             for name, run in programs.items()}  # fmt: skip
    assert np.array_equal(*(run(0) for run in sides.values()))
    return take_turns(sides, REPEATS)


def main():
    on = machine()
    lines = [
        "# Caches that grow (made by `python -m benchmarks.growing`)", "",
        f"{PROMPTS * GROUP} rows after prompts of {PROMPT_TOKENS} tokens, d128 x 2, fp32, prefill included; every row",
        f"goes on to its last column. Growing: at {', '.join(map(str, GROW_AT))} tokens. Medians of {REPEATS} turns;",
        "the ratio, with its least and largest, is of one turn.", "",
        f"{on['device']}, {on['processor']}, {on['cores']} cores, load {on['load_before']:.1f} before; "
        f"Python {on['python']}, jax {on['jax']}.", "",
        "| completion columns | full length, s | growing, s | full / growing (range) |", "|---|---|---|---|",
    ]  # fmt: skip
    for columns in (64, 256, 1024):
        found = {side: np.asarray(times) for side, times in seconds(columns).items()}
        ratios = found["full"] / found["growing"]
        lines.append(f"| {columns} | {np.median(found['full']):.3f} | {np.median(found['growing']):.3f} | "
                     f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f}) |")  # fmt: skip
        print(lines[-1], flush=True)
    HERE.joinpath("GROWING.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
