"""Times an update whose learner reads each prompt once for its group beside one that reads every row whole, in turns.

    python -m benchmarks.forward        writes FORWARD.md beside this file
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import CONFIG, machine, take_turns
from mlrl import reductions, scoring, updates
from mlrl.batches import unannotated
from mlrl.generation import generate
from mlrl.losses.policy import ppo_clip
from mlrl.models.transformer import Transformer, initialize
from mlrl.optimizers import adamw
from mlrl.types import Prompts, TrainState

# prompts, group size, prompt tokens, completion tokens (all rows full), rows of a micro-batch
CASES = [(32, 8, 6, 5, 0), (32, 8, 6, 5, 16), (32, 8, 16, 64, 0), (32, 8, 16, 64, 16), (32, 8, 96, 24, 0),
         (32, 8, 96, 24, 16), (16, 16, 96, 24, 16), (32, 1, 16, 16, 0)]  # fmt: skip
FORWARDS = {"baseline": scoring.whole_rows(), "mlrl": scoring.shared_prompts()}
REPEATS = 7


def seconds(prompts, group_size, prompt_tokens, new_tokens, micro_batch_rows):
    """Seconds of each repeat of both sides; both must end at the same parameters."""
    model, optimizer = Transformer(CONFIG), adamw(learning_rate=1e-3)
    params, zeros = initialize(model, jax.random.key(0)), jnp.zeros(prompts, jnp.int32)
    tokens = jax.random.randint(jax.random.key(1), (prompts, prompt_tokens), 0, CONFIG.vocabulary_size)
    given = Prompts(tokens, jnp.ones_like(tokens, bool), zeros, zeros, ())
    sample = functools.partial(generate, model, max_completion_tokens=new_tokens, eos_ids=(-1,), pad_id=0,
                               group_size=group_size)  # fmt: skip
    rollout = jax.jit(sample)(params, given, jax.random.key(0))
    advantages = jax.random.normal(jax.random.key(1), (prompts * group_size, 1)) * rollout.action_mask
    batch = unannotated(rollout).replace(advantages=advantages, old_log_probs=rollout.behavior_log_probs)
    state = TrainState(step=jnp.int32(0), key=jax.random.key(0), params=params, opt_state=optimizer.init(params),
                       reference=(), curriculum=(), reward=(), controllers={}, bad_updates=jnp.int32(0))  # fmt: skip

    def side(forward):
        step = jax.jit(functools.partial(
            updates.update, losses=[ppo_clip], reduction=reductions.token_mean, optimizer=optimizer,
            micro_batch_rows=micro_batch_rows, prepare=lambda params: forward.prepare(model, params, given),
            score_fn=lambda params, rows, *more: forward.score(model, params, given, rows, *more),
        ))  # fmt: skip
        return lambda repeat: step(state, batch, jax.random.key(2))

    sides = {name: side(forward) for name, forward in FORWARDS.items()}
    norms = [float(run(0)[1]["grad_norm"]) for run in sides.values()]
    assert np.allclose(*norms, rtol=1e-4), norms
    return take_turns(sides, REPEATS)


def main():
    on = machine()
    lines = [
        "# Reading each prompt once (made by `python -m benchmarks.forward`)", "",
        f"One optimizer step of PPO's loss on full rows, d128 x 2, fp32; medians of {REPEATS} turns. The ratio is of",
        "one turn's seconds, prompts read once to rows read whole: its median and quartiles.", "",
        f"{on['device']}, {on['processor']}, {on['cores']} cores, load {on['load_before']:.1f} before; "
        f"Python {on['python']}, jax {on['jax']}.", "",
        "| prompts x group | prompt | completion | micro-batch | rows whole | prompts once | ratio (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in CASES:
        n, g, p, t, micro = case
        found = {name: np.asarray(times) for name, times in seconds(*case).items()}
        low, middle, high = np.percentile(found["mlrl"] / found["baseline"], [25, 50, 75])
        whole, once = (np.median(found[name]) for name in ("baseline", "mlrl"))
        lines.append(f"| {n} x {g} | {p} | {t} | {micro or 'all rows'} | {whole:.3f} s | {once:.3f} s | {middle:.2f} "
                     f"({low:.2f}-{high:.2f}) |")  # fmt: skip
        print(lines[-1], flush=True)
    pathlib.Path(__file__).with_name("FORWARD.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
