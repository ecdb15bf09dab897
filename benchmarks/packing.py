"""Times gradients of stored rows of very different lengths: padded, cut to buckets of lengths, and packed, in turns.

    python -m benchmarks.packing       writes PACKING.md beside this file
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import CONFIG, machine, take_turns
from mlrl import batches, packing, reductions, scoring, updates
from mlrl.losses.supervised import next_token
from mlrl.models.transformer import Transformer, initialize
from mlrl.types import Rewards, Rollout

HERE = pathlib.Path(__file__).resolve().parent
ROWS, LONGEST, MEAN, MICRO, REPEATS = 256, 128, 24, 16, 7
WIDTHS = (32, 64, 128)


def stored_rows():
    """Rows of random tokens whose lengths are geometric."""
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / MEAN, ROWS), LONGEST)
    valid = jnp.arange(LONGEST) < jnp.asarray(lengths)[:, None]
    zeros, none = jnp.zeros((ROWS, LONGEST)), jnp.zeros(ROWS, jnp.int32)
    tokens = jax.random.randint(jax.random.key(0), (ROWS, LONGEST), 0, CONFIG.vocabulary_size)
    rollout = Rollout(tokens=tokens, valid=valid, action_mask=valid.at[:, 0].set(False), behavior_log_probs=zeros,
                      turn=zeros.astype(jnp.int32), role=none, group=jnp.arange(ROWS), truncated=none > 0,
                      policy_version=none)  # fmt: skip
    rewards = Rewards(tokens=zeros, outcome=zeros[:, 0], scored=none == 0, parts={})
    batch = batches.unannotated(rollout, rewards)
    weights = reductions.token_mean(batch.mask)
    return batch.replace(weights=weights, token_weights=weights), lengths


def main():
    on, model = machine(), Transformer(CONFIG)
    params, (batch, lengths) = initialize(model, jax.random.key(0)), stored_rows()
    tokens = int(lengths.sum())
    longest = np.sort(lengths).reshape(-1, MICRO).max(1)
    cut = MICRO * sum(next(w for w in WIDTHS if w >= n) for n in longest)
    arms = {  # knobs of `gradients`, columns that are read
        "padded": ({"micro_batch_rows": MICRO}, ROWS * LONGEST),
        f"buckets of {', '.join(map(str, WIDTHS))}": ({"micro_batch_rows": MICRO, "bucket_columns": WIDTHS}, cut),
    }  # fmt: skip
    for columns in (LONGEST, 2 * LONGEST):
        rows = -(-tokens // columns) + 256 // columns
        score_fn = functools.partial(packing.score, model, rows=rows, columns=columns)
        arms[f"packed into {rows} rows of {columns}, at once"] = ({"score_fn": score_fn}, rows * columns)
    settings = {"losses": (next_token,), "score_fn": functools.partial(scoring.score, model)}
    programs = {name: jax.jit(functools.partial(updates.gradients, **(settings | knobs)))
                for name, (knobs, _) in arms.items()}  # fmt: skip
    found = [jax.tree.leaves(program(params, batch)[0]) for program in programs.values()]
    gap = max(float(jnp.abs(a - b).max()) for other in found[1:] for a, b in zip(other, found[0]))
    times = take_turns({name: lambda _, run=run: run(params, batch) for name, run in programs.items()}, REPEATS)
    lines = [
        "# Packed rows beside padded ones (made by `python -m benchmarks.packing`)", "",
        f"Gradients of the next-token loss over {ROWS} rows of geometric lengths (mean {lengths.mean():.0f}, longest",
        f"{lengths.max()}), d128 x 2, fp32; micro-batches of {MICRO} rows but where packed, which computes its forward",
        f"pass twice. Medians of {REPEATS} turns; the ratio, with its least and largest, is of one turn. Gradients",
        f"differ by {gap:.1e} at most.", "",
        f"{on['device']}, {on['processor']}, {on['cores']} cores, load {on['load_before']:.1f} before; "
        f"Python {on['python']}, jax {on['jax']}.", "",
        "| rows | columns without a token | seconds | ratio to padded |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, (_, read) in arms.items():
        seconds, base = np.asarray(times[name]), np.asarray(times["padded"])
        lines.append(f"| {name} | {1 - tokens / read:.0%} | {np.median(seconds):.3f} | {np.median(seconds / base):.2f} "
                     f"({(seconds / base).min():.2f}-{(seconds / base).max():.2f}) |")  # fmt: skip
        print(lines[-1], flush=True)
    HERE.joinpath("PACKING.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
