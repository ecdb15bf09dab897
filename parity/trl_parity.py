"""The parity test: TRL's losses and ours on the same random tensors, equal in value and gradient to 1e-5.

    python parity/trl_parity.py                 makes parity/.venv with torch and TRL, once, and compares
    python parity/trl_parity.py --npz FILE      compares with what trl_side.py wrote elsewhere
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

import environment
import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mlrl import advantages, batches, importance, reductions, updates  # noqa: E402
from mlrl.losses import (  # noqa: E402
    contrasts,
    distillation,
    policy,
    preference,
    regularizers,
    reward_models,
    supervised,
    surrogates,
)
from mlrl.types import Rewards, Rollout, Scores  # noqa: E402

ENVIRONMENT = environment.FOLDER
NPZ = ENVIRONMENT / "trl.npz"
TOLERANCE = 1e-5
with_ = functools.partial
total = with_(with_, updates.total_loss)  # losses -> (scores, batch) -> (sum, metrics)

token_mean, row_mean = reductions.token_mean, reductions.sequence_mean_token_mean
GRPO = {  # TRL's case: our loss, our reduction
    "grpo": (policy.ppo_clip, row_mean),
    "bnpo": (policy.ppo_clip, token_mean),
    "dapo": (policy.ppo_clip, token_mean),
    "dr_grpo": (policy.ppo_clip, with_(reductions.constant_length, length=6)),
    "sapo": (policy.sapo, row_mean),
    "cispo": (with_(policy.cispo, clip_high=0.2), token_mean),
    "vespo": (policy.vespo, token_mean),
    "gspo": (with_(policy.gspo, clip_low=3e-2, clip_high=4e-2), row_mean),
    "luspo": (with_(policy.gspo, clip_low=0.2, clip_high=0.2), reductions.sequence_mean_token_sum),
    "clip_higher": (with_(policy.ppo_clip, clip_high=0.28), token_mean),
    "delta": (with_(policy.dual_clip, clip_dual=1.5), token_mean),
    "kl": (total([policy.ppo_clip, with_(regularizers.kl_penalty, kl_coef=0.04)]), token_mean),
    "entropy": (total([policy.ppo_clip, with_(regularizers.entropy_bonus, entropy_coef=0.01)]), token_mean),
}
BETA = 0.3
DPO = {
    "sigmoid": contrasts.logistic,
    "hinge": contrasts.hinge,
    "nca_pair": contrasts.nca,
    "bco_pair": contrasts.bco,
    "sppo_hard": lambda chosen, rejected: contrasts.sppo(chosen, rejected) / BETA**2,
    "apo_zero": contrasts.apo_zero,
    "apo_down": contrasts.apo_down,
    "discopop": contrasts.discopop,
    "exo_pair": with_(contrasts.exo, label_smoothing=0.1),
    "robust": with_(contrasts.robust, label_smoothing=0.1),
}
PAIRS = {f"dpo/{name}": with_(preference.dpo, beta=BETA, contrast=contrast) for name, contrast in DPO.items()} | {
    "dpo/ipo": with_(preference.ipo, tau=BETA),
    "dpo/sigmoid_norm": with_(preference.dpo, beta=BETA, row_of=reductions.row_mean),
    "cpo/sigmoid": with_(preference.cpo, beta=0.1),
    "cpo/simpo": with_(preference.simpo, beta=2.0, margin=0.25),  # TRL's gamma is beta * margin
    "orpo/orpo": preference.orpo,
}
DISTILLATION = {
    "0.0": distillation.forward_kl,
    "0.3": with_(distillation.jensen_shannon, beta=0.3),
    "0.5": distillation.jensen_shannon,
    "1.0": distillation.reverse_kl,
}
NOT_COMPARED = "aot and aot_unpaired sort over the batch, which no micro-batch can: mlrl does not have them"


def rows(x: dict, mask: np.ndarray, outcome: np.ndarray, **given):
    """A batch of the tensors in x: rows i and i + B/2 are the chosen and the rejected one of group i."""
    b, length = mask.shape
    zeros = jnp.zeros((b,), jnp.int32)
    rollout = Rollout(
        tokens=jnp.zeros((b, length), jnp.int32), valid=jnp.asarray(mask), action_mask=jnp.asarray(mask),
        behavior_log_probs=jnp.asarray(x["old"]), turn=jnp.zeros((b, length), jnp.int32), role=zeros,
        group=jnp.arange(b) % (b // 2), truncated=zeros > 0, policy_version=zeros,
    )  # fmt: skip
    rewards = Rewards(jnp.zeros((b, length)), jnp.asarray(outcome, jnp.float32), jnp.ones((b,), bool), {})
    batch = batches.unannotated(rollout, rewards).replace(
        old_log_probs=jnp.asarray(x["old"]), reference_log_probs=jnp.asarray(x["reference"]),
        advantages=jnp.where(mask, jnp.asarray(x["advantages"])[:, None], 0.0), **given,
    )  # fmt: skip
    return batch


def differentiated(at: np.ndarray, loss_of: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(loss, gradient) at the array `at`."""
    return jax.jit(jax.value_and_grad(loss_of))(jnp.asarray(at))


def by_log_probs(x: dict, loss_fn: Callable, batch, reduction) -> tuple[np.ndarray, np.ndarray]:
    """(loss, gradient by log-probs) of a loss function with a reduction."""
    batch = batch.replace(weights=reduction(batch.mask), token_weights=token_mean(batch.mask))
    b = batch.mask.shape[0]
    entropy = jnp.asarray(x["entropy"])[:b]
    return differentiated(x["log_probs"][:b], lambda lp: loss_fn(Scores(lp, entropy, lp), batch)[0])


def kto(x: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """KTO with the mismatched rows behind the others, in a role of their own, without a score."""
    twice = lambda a, b: np.concatenate([a, b])
    both = {key: twice(x[key], x[f"mismatched{suffix}"]) for key, suffix in (("reference", "_reference"), ("old", ""))}
    both |= {"advantages": twice(x["advantages"], x["advantages"]), "entropy": twice(x["entropy"], x["entropy"])}
    n = len(x["mask"])
    outcome = np.arange(2 * n) < n // 2
    batch = rows(both, twice(x["mask"], x["mask"]), outcome)
    scored = jnp.arange(2 * n) < n
    batch = batch.replace(
        rollout=batch.rollout.replace(role=jnp.where(scored, 0, 1)), rewards=batch.rewards.replace(scored=scored),
        mask=batch.mask & scored[:, None],
    )  # fmt: skip
    sign, point = advantages.kto(batch, reference_role=1)
    batch = batch.replace(advantages=sign, returns=point if name == "kto" else jnp.zeros_like(point))
    loss_fn = with_(preference.kto, beta=BETA, undesirable_weight=1.5)
    log_probs = twice(x["log_probs"], x["mismatched"])
    loss, gradient = by_log_probs(both | {"log_probs": log_probs}, loss_fn, batch, row_mean)
    return loss, gradient[:n]


def rloo(x: dict) -> tuple[np.ndarray, np.ndarray]:
    """PPO's surrogate on the product of a row's ratios, a mean over rows."""

    def loss_of(log_probs):
        row = reductions.row_sum(importance.log_ratio(log_probs, x["old"], x["mask"]), x["mask"])
        return surrogates.clipped_surrogate(row, jnp.asarray(x["advantages"]))[0].mean()

    return differentiated(x["log_probs"], loss_of)


def reward_model(x: dict, centre: float) -> tuple[np.ndarray, np.ndarray]:
    """Bradley-Terry; TRL's margin is a difference in outcome."""
    n = len(x["mask"])
    batch = rows(x, x["mask"], np.concatenate([x["margin"], np.zeros(n // 2)]))
    batch = batch.replace(weights=row_mean(batch.mask))
    last = jnp.arange(x["mask"].shape[1]) == x["mask"].sum(axis=1)[:, None] - 1

    def loss_of(rewards):
        values = jnp.where(last, rewards[:, None], jnp.nan)
        return reward_models.bradley_terry(Scores(values, values, values), batch, margin=1.0, centre_coef=centre)[0]

    return differentiated(x["rewards"], loss_of)


def ours(name: str, x: dict) -> tuple[np.ndarray, np.ndarray]:
    """(loss, gradient) of TRL's case `name` by our parts."""
    kind, _, case = name.partition("/")
    chosen = np.arange(len(x["mask"])) < len(x["mask"]) // 2
    if kind == "grpo":
        loss_fn, reduction = GRPO[case]
        return by_log_probs(x, loss_fn, rows(x, x["mask"], chosen), reduction)
    if name == "dpo/sft":
        return by_log_probs(x, supervised.next_token, rows(x, x["mask"] & chosen[:, None], chosen), token_mean)
    if name in PAIRS:
        mask = x["even_mask"] if kind in ("cpo", "orpo") else x["mask"]
        loss_fn = PAIRS[name]
        return by_log_probs(x, loss_fn, rows(x, mask, chosen), row_mean)
    if kind == "kto":
        return kto(x, case)
    if kind == "rloo":
        return rloo(x)
    if kind == "reward":
        return reward_model(x, float(case.removeprefix("centre_").replace("None", "0")))
    divergence = DISTILLATION[case.removeprefix("beta_")]
    mask = jnp.asarray(x["mask"])
    return differentiated(
        x["student"], lambda s: jnp.sum(token_mean(mask) * divergence(s, jnp.asarray(x["teacher"])))
    )


def cases(stored: dict) -> list[str]:
    """The names of TRL's losses in an .npz."""
    return [key for key in stored if f"{key}.grad" in stored]


def difference(name: str, stored: dict) -> float:
    """The largest difference between TRL and us, in the loss and in every component of its gradient."""
    x = {key.removeprefix("in/"): value for key, value in stored.items() if key.startswith("in/")}
    loss, gradient = ours(name, x)
    if not np.abs(stored[f"{name}.grad"]).max() > 0:
        raise AssertionError(f"TRL's gradient of {name} is zero, which shows nothing")
    return float(max(np.abs(loss - stored[name]), np.abs(gradient - stored[f"{name}.grad"]).max()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npz", default="", help="what trl_side.py wrote; without it the environment is made")
    arguments = parser.parse_args()
    if not arguments.npz:
        problem = environment.run(ENVIRONMENT, HERE / "trl_side.py", NPZ)
        if problem:
            print(f"parity with TRL was not checked: {problem}")
            return 0
    stored = dict(np.load(arguments.npz or NPZ))
    names, failed = cases(stored), 0
    for name in names:
        found = difference(name, stored)
        failed += found > TOLERANCE
        print(f"{name:<28} {found:.1e}  {'ok' if found <= TOLERANCE else 'DIFFERS'}")
    print(f"TRL {stored['version']}: {len(names) - failed} of {len(names)} losses and gradients equal to {TOLERANCE:g}")
    print(f"not compared: {NOT_COMPARED}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
