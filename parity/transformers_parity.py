"""The parity test of models: checkpoints that transformers made, in our transformer; and ours, in transformers.

    python parity/transformers_parity.py                makes parity/.venv, once, and the checkpoints, and compares
    python parity/transformers_parity.py --folder DIR   compares with what transformers_side.py left in DIR

For every case: the logits are equal to 1e-5, the greedy continuations of 64 tokens are the same, and the export is
loaded by transformers with the same results. Then mistakes are planted in our half, and each must be seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import shutil
import sys
from collections.abc import Callable

import environment
import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mlrl.generation import as_rollout, generate  # noqa: E402
from mlrl.loops import stages  # noqa: E402
from mlrl.models import norms, pretrained, rope  # noqa: E402
from mlrl.models.transformer import Config, Transformer, causal_mask, row_positions  # noqa: E402
from mlrl.rewards import learned  # noqa: E402
from mlrl.sampling import Sampling  # noqa: E402
from mlrl.types import Params, Prompts  # noqa: E402

FOLDER = environment.FOLDER / "models"
TOLERANCE = 1e-5


def cases(folder: pathlib.Path) -> list[str]:
    """The names of the cases in a folder."""
    return sorted(path.parent.name for path in folder.glob("*/theirs.npz"))


def imported(case: pathlib.Path) -> tuple[Config, Params]:
    """The model of a case, as mlrl reads it."""
    config = pretrained.config(case / "model")
    return config, pretrained.start(path=case / "model")(Transformer(config), jax.random.key(0))


def logits(config: Config, params: Params, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logits of padded rows; operation by operation, since the many changed models would take minutes to compile."""
    model, valid = Transformer(config), jnp.asarray(valid)
    hidden, _ = model.apply({"params": params}, jnp.asarray(tokens), row_positions(valid), causal_mask(valid))
    return np.asarray(model.apply({"params": params}, hidden, method=Transformer.logits))


def greedy(config: Config, params: Params, tokens: np.ndarray, valid: np.ndarray, steps: int) -> np.ndarray:
    """The greedy continuation of padded rows, over the cache."""
    rows = jnp.arange(len(tokens))
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(valid), rows, rows, ())
    sample = functools.partial(generate, Transformer(config), max_completion_tokens=steps, eos_ids=(), pad_id=0,
                               sampling=Sampling(temperature=0.0))  # fmt: skip
    return np.asarray(jax.jit(sample)(params, prompts, jax.random.key(0)).tokens[:, tokens.shape[1] :])


def difference(config: Config, params: Params, theirs: dict[str, np.ndarray]) -> float:
    """The largest difference between their logits and ours, at valid tokens."""
    valid = theirs["valid"]
    found, wanted = logits(config, params, theirs["tokens"], valid)[valid], theirs["logits"][valid]
    return float(np.abs(found - wanted).max())


def _without_rope(config: Config, params: Params) -> tuple[Config, Params]:
    still = lambda frequency, theta: (0.0 * frequency, 1.0)
    return dataclasses.replace(config, rope_scaling=still, window_rope_theta=0.0), params


def _swapped_gate(config: Config, params: Params) -> tuple[Config, Params]:
    swap = lambda path, x: x[..., ::-1, :] if any(getattr(key, "key", "") == "gate_up" for key in path) else x
    return config, jax.tree_util.tree_map_with_path(swap, params)


def _wrong_norm(config: Config, params: Params) -> tuple[Config, Params]:
    other = norms.OffsetRMSNorm if config.norm is norms.RMSNorm else norms.RMSNorm
    return dataclasses.replace(config, norm=other), params


def _changed(**fields) -> Callable[[Config, Params], tuple[Config, Params]]:
    return lambda config, params: (dataclasses.replace(config, **fields), params)


# Mistakes, each with the configs that it would be a mistake in.
PLANTED = {
    "no rope": (lambda c: not c.learned_positions, _without_rope),
    "gate and up swapped": (lambda c: c.gated_mlp, _swapped_gate),
    "wrong norm": (lambda c: True, _wrong_norm),
    "no rope scaling": (lambda c: c.rope_scaling is not rope.unscaled, _changed(rope_scaling=rope.unscaled)),
    "no window": (lambda c: any(c.windows), _changed(windows=(0,))),
    "one rope base": (lambda c: c.window_rope_theta > 0, _changed(window_rope_theta=0.0)),
    "no norms of queries and keys": (lambda c: c.qk_norm, _changed(qk_norm=False)),
    "no norms behind the branches": (lambda c: c.post_norms, _changed(post_norms=False)),
    "no cap of attention": (lambda c: c.attention_cap > 0, _changed(attention_cap=0.0)),
    "no cap of logits": (lambda c: c.logits_cap > 0, _changed(logits_cap=0.0)),
    "attention scaled by head_width": (lambda c: c.scale_width > 0, _changed(scale_width=0)),
    "embedding not scaled": (lambda c: c.embedding_scale != 1.0, _changed(embedding_scale=1.0)),
    "silu in place of gelu": (lambda c: c.activation is not jax.nn.silu, _changed(activation=jax.nn.silu)),
    "another weight of experts": (
        lambda c: c.experts > 0,
        lambda c, params: (dataclasses.replace(c, experts_renormalized=not c.experts_renormalized), params)),
    "one expert only": (lambda c: c.experts > 0, _changed(experts_per_token=1)),
    "no biases of queries": (lambda c: c.qkv_bias, _changed(qkv_bias=False)),
    "no bias behind attention": (lambda c: c.out_bias, _changed(out_bias=False)),
    "no biases of the MLP": (lambda c: c.mlp_bias, _changed(mlp_bias=False)),
}


def compared(case: pathlib.Path) -> list[str]:
    """What is wrong with a case before its export is loaded; prints the differences; writes the export."""
    theirs = dict(np.load(case / "theirs.npz"))
    config, params = imported(case)
    found, wrong = difference(config, params, theirs), []
    if not found <= TOLERANCE:
        wrong.append(f"logits differ by {found:.1e}")
    said = greedy(config, params, theirs["tokens"], theirs["valid"], theirs["greedy"].shape[1])
    if not np.array_equal(said, theirs["greedy"]):
        wrong.append("greedy continuations differ")
    least = np.inf
    for name, (applies, plant) in PLANTED.items():
        if applies(config):
            moved = difference(*plant(config, params), theirs)
            least = min(least, moved)
            if not moved > 100 * TOLERANCE:
                wrong.append(f"{name!r} moves logits by {moved:.1e} only")
    shutil.rmtree(case / "export", ignore_errors=True)
    pretrained.write(case / "export", params, config)
    again = pretrained.start(path=case / "export")(Transformer(config), jax.random.key(1))
    if not jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, again)):
        wrong.append("import, export, import is not the first import")
    told = ", ".join(wrong) or "ok"
    print(f"{case.name:<20} logits {found:.1e}, the least planted mistake {least:.1e}  {told}")
    return wrong


def judged(case: pathlib.Path) -> list[str]:
    """What is wrong with the scores of a case's sequence classifier, read behind the last token as transformers reads.
    """
    theirs = np.load(case / "scores.npz")
    config, begin = pretrained.judge(path=case / "judge")
    params, rows = begin(Transformer(config), jax.random.key(0)), len(theirs["tokens"])
    tokens, valid = jnp.asarray(theirs["tokens"]), jnp.asarray(theirs["valid"])
    asked = Prompts(tokens, valid, jnp.arange(rows), jnp.arange(rows), ())
    rollout = as_rollout(asked, tokens[:, :0], jnp.zeros((rows, 0)), jnp.zeros(rows, jnp.int32),
                         ended=jnp.ones(rows, bool), policy_version=0)  # fmt: skip
    rollout = rollout.replace(action_mask=valid)
    judge = functools.partial(stages.values_of, Transformer(config), params)
    found = float(np.abs(learned.behind_last_action(judge, rollout) - theirs["scores"]).max())
    early = float(np.abs(learned.before_last_action(judge, rollout) - theirs["scores"]).max())
    wrong = [f"scores differ by {found:.1e}"] * (not found <= TOLERANCE)
    wrong += [f"read one token early they differ by {early:.1e} only"] * (not early > 100 * TOLERANCE)
    print(f"{case.name:<20} scores {found:.1e}, read one token early {early:.1e}  {', '.join(wrong) or 'ok'}")
    return wrong


def loaded_again(case: pathlib.Path) -> list[str]:
    """What differs between a checkpoint and our export of it, both in transformers."""
    before, after = (np.load(case / name) for name in ("theirs.npz", "again.npz"))
    if np.array_equal(before["logits"], after["logits"]) and np.array_equal(before["greedy"], after["greedy"]):
        return []
    found = float(np.abs(before["logits"] - after["logits"]).max())
    print(f"{case.name:<20} the export differs in transformers by {found:.1e}")
    return ["export"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="", help="what transformers_side.py wrote; exports are not loaded then")
    arguments = parser.parse_args()
    side, folder = HERE / "transformers_side.py", pathlib.Path(arguments.folder or FOLDER)
    if not arguments.folder:
        shutil.rmtree(folder, ignore_errors=True)
        problem = environment.run(environment.FOLDER, side, "make", folder)
        if problem:
            print(f"parity with transformers was not checked: {problem}")
            return 0
    failed = {name for name in cases(folder) if compared(folder / name)}
    judges = [path.parent for path in sorted(folder.glob("*/scores.npz"))]
    failed |= {f"the judge {case.name}" for case in judges if judged(case)}
    if not arguments.folder:
        problem = environment.run(environment.FOLDER, side, "load", folder)
        if problem:
            print(f"transformers does not load an export: {problem}")
            return 1
        failed |= {name for name in cases(folder) if loaded_again(folder / name)}
    version, count = str(np.load(folder / "llama" / "theirs.npz")["version"]), len(cases(folder))
    count += len(judges)
    print(f"transformers {version}: {count - len(failed)} of {count} models ({len(judges)} of them sequence "
          f"classifiers) have equal logits (to {TOLERANCE:g}) and greedy continuations"
          + ("" if arguments.folder else ", there and back"))  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
