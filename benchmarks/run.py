"""Times mlrl beside bare JAX, turn by turn in one process, and writes results.json and RESULTS.md: `make bench`.

Seconds depend on the machine and on what else it does; the two sides take turns so that the ratio does not.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import decode_baseline, update_baseline
from mlrl.batches import unannotated
from mlrl.generation import generate
from mlrl.losses.policy import ppo_clip
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.optimizers import adamw
from mlrl.reductions import token_mean
from mlrl.scoring import score
from mlrl.types import Prompts, TrainState
from mlrl.updates import update

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = Config(vocabulary_size=128)  # d128 x 2 layers, 4 heads over 2 key/value heads
ROWS, PROMPT_TOKENS, NEW_TOKENS = 256, 16, 64
DECODE_GOAL = 0.85  # of the baseline's tokens per second, at least
UPDATE_GOAL = 1.15  # of the baseline's seconds, at most


def bare(params):
    """The weights of an mlrl Transformer in the dict that the baselines read."""
    layers = [
        {
            "attention_norm": params[f"attention_norms_{i}"]["scale"],
            "qkv": params[f"attentions_{i}"]["qkv"]["kernel"],
            "out": params[f"attentions_{i}"]["out"]["kernel"],
            "mlp_norm": params[f"mlp_norms_{i}"]["scale"],
            "gate_up": params[f"mlps_{i}"]["gate_up"]["kernel"],
            "down": params[f"mlps_{i}"]["down"]["kernel"],
        }
        for i in range(CONFIG.layers)
    ]
    return {"embedding": params["embedding"]["embedding"], "norm": params["final_norm"]["scale"], "layers": layers}


def take_turns(sides, repeats):
    """Seconds of each repeat of each side, {name: [repeats]}; the first, with compilation, is not counted."""
    seconds = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(run(repeat))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measured(name, seconds, *, work, unit, goal):
    """Medians, quartiles and the ratio of one comparison; `work` / seconds is the rate in `unit`.

    A goal below 1 is the least share of the baseline's rate, one above 1 the most of its seconds.
    """
    ours, base = np.asarray(seconds["mlrl"]), np.asarray(seconds["baseline"])
    ratios = base / ours if goal < 1 else ours / base
    ratio = float(np.median(base) / np.median(ours) if goal < 1 else np.median(ours) / np.median(base))
    side = lambda s: {"median_seconds": float(np.median(s)), "quartiles_seconds": np.percentile(s, [25, 75]).tolist(),
                      unit: float(work / np.median(s))}  # fmt: skip
    return {
        "name": name, "repeats": len(ours), "mlrl": side(ours), "baseline": side(base), "unit": unit,
        "ratio": ratio, "ratio_of_fastest": float(base.min() / ours.min() if goal < 1 else ours.min() / base.min()),
        "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
        "goal": f"{'at least' if goal < 1 else 'at most'} {goal}", "met": ratio >= goal if goal < 1 else ratio <= goal,
    }  # fmt: skip


def decoding(repeats):
    """Generation of all rows, without an EOS that could end it early. Both sides prefill every prompt."""
    model, key = Transformer(CONFIG), jax.random.key(0)
    params = initialize(model, key)
    tokens = jax.random.randint(key, (ROWS, PROMPT_TOKENS), 0, CONFIG.vocabulary_size)
    zeros = jnp.zeros((ROWS,), jnp.int32)
    prompts = Prompts(tokens=tokens, valid=jnp.ones_like(tokens, bool), source=zeros, index=zeros, example=())
    ours = jax.jit(lambda params, prompts, key: generate(model, params, prompts, key, pad_id=0, eos_ids=(-1,),
                                                         max_completion_tokens=NEW_TOKENS))  # fmt: skip
    base = jax.jit(functools.partial(decode_baseline.decode, new_tokens=NEW_TOKENS))
    rollout = ours(params, prompts, key)
    assert int(rollout.action_mask.sum()) == ROWS * NEW_TOKENS and bool(rollout.truncated.all())
    weights = bare(params)
    sides = {
        "baseline": lambda i: base(weights, tokens, jax.random.key(i)),
        "mlrl": lambda i: ours(params, prompts, jax.random.key(i)),
    }
    assert sides["baseline"](0).shape == (ROWS, NEW_TOKENS)
    return rollout, measured("decode", take_turns(sides, repeats), work=ROWS * NEW_TOKENS, unit="tokens_per_second",
                             goal=DECODE_GOAL)  # fmt: skip


def updating(rollout, repeats, micro_batch_rows):
    """One optimizer step on all rows with given advantages, in the same micro-batches on both sides."""
    model, optimizer = Transformer(CONFIG), adamw(learning_rate=1e-3)
    params = initialize(model, jax.random.key(0))
    advantages = jax.random.normal(jax.random.key(1), (ROWS, 1)) * rollout.action_mask
    batch = unannotated(rollout).replace(advantages=advantages, old_log_probs=rollout.behavior_log_probs)
    state = TrainState(step=jnp.int32(0), key=jax.random.key(0), params=params, opt_state=optimizer.init(params),
                       reference=(), curriculum=(), reward=(), controllers={}, bad_updates=jnp.int32(0))  # fmt: skip
    score_fn = lambda params, rows: score(model, params, rows, first_column=PROMPT_TOKENS)
    ours = jax.jit(lambda state, batch, key: update(state, batch, key, score_fn=score_fn, losses=[ppo_clip],
                                                    reduction=token_mean, optimizer=optimizer,
                                                    micro_batch_rows=micro_batch_rows))  # fmt: skip
    weights, adam = bare(params), optax.adam(1e-3)
    adam_state = adam.init(weights)
    base = jax.jit(functools.partial(update_baseline.step, optimizer=adam, prompt_tokens=PROMPT_TOKENS,
                                     micro_batch_rows=micro_batch_rows))  # fmt: skip
    given = (rollout.tokens, rollout.behavior_log_probs[:, PROMPT_TOKENS:], advantages[:, PROMPT_TOKENS:])
    key = jax.random.key(2)
    # The same arithmetic, or the comparison means nothing: the same loss, from the sampler's own log-probs.
    loss, bare_loss = ours(state, batch, key)[1]["loss"], base(weights, adam_state, *given)[2]
    assert np.allclose(loss, bare_loss, atol=1e-5), (loss, bare_loss)
    sides = {
        "baseline": lambda i: base(weights, adam_state, *given),
        "mlrl": lambda i: ours(state, batch, key),
    }
    name = f"update, micro-batches of {micro_batch_rows}" if micro_batch_rows else "update, one batch"
    return measured(name, take_turns(sides, repeats), work=ROWS, unit="rows_per_second", goal=UPDATE_GOAL)


def machine():
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "jaxlib", "flax", "optax")},
    }


def _lines(path):
    return pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []


def as_markdown(results):
    m = results["machine"]
    lines = [
        f"{ROWS} rows, prompt {PROMPT_TOKENS}, {NEW_TOKENS} new tokens, d{CONFIG.width} x {CONFIG.layers}, fp32;",
        f"medians of {results['cases'][0]['repeats']} turns. The last column is the ratio of the fastest turns, which",
        "other work on the machine disturbs least.", "",
        f"{m['device']}, {m['processor']}, {m['cores']} cores, load {m['load_before']:.1f} before; Python "
        f"{m['python']}, jax {m['jax']}, flax {m['flax']}.", "",
        "| what | baseline | mlrl | ratio (quartiles) | goal | | of the fastest |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in results["cases"]:
        base, ours = (f"{side['median_seconds']:.3f} s ({side[case['unit']]:,.0f}/s)"
                      for side in (case["baseline"], case["mlrl"]))  # fmt: skip
        ratio = f"{case['ratio']:.2f} ({case['ratio_quartiles'][0]:.2f}-{case['ratio_quartiles'][1]:.2f})"
        met = "met" if case["met"] else "MISSED"
        cells = (case["name"], base, ours, ratio, case["goal"], met, f"{case['ratio_of_fastest']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    results = {"machine": machine()}
    rollout, decode = decoding(repeats)
    results["cases"] = [decode, *(updating(rollout, repeats, rows) for rows in (0, 16))]
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text("# Speed beside bare JAX (made by `make bench`)\n\n" + as_markdown(results))
    print(as_markdown(results))


if __name__ == "__main__":
    main()
