"""TRL's half of the parity test: runs in TRL's environment and writes its losses and gradients to an .npz.

    python trl_side.py OUT.npz

Only the loss functions run. A trainer is made without its constructor, and what would be a model's output is a random
tensor; so no model, data set or network is needed. Keys: "case/name" holds the loss, "case/name.grad" its gradient by
the log-probs (or rewards, or logits); the inputs are written beside them under "in/...".
"""

import collections
import os
import sys
import types

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import trl
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

ROWS, COLUMNS, VOCABULARY = 8, 6, 11
LENGTHS = [6, 3, 5, 1, 4, 6, 2, 5]
EVEN = [4] * ROWS  # for CPO and ORPO, whose likelihood term averages over all tokens, ours over rows
NOTHING = types.SimpleNamespace()


def inputs():
    """Random tensors: log-probs of four policies, advantages, rewards, entropies, logits."""
    rng = np.random.default_rng(0)
    log_probs = -rng.gamma(2.0, 0.4, (ROWS, COLUMNS))
    near = lambda scale: log_probs + scale * rng.normal(size=log_probs.shape)
    arrays = {
        "mask": np.arange(COLUMNS)[None] < np.array(LENGTHS)[:, None],
        "even_mask": np.arange(COLUMNS)[None] < np.array(EVEN)[:, None],
        "log_probs": log_probs,
        "old": near(0.3),
        "reference": near(0.5),
        "mismatched": near(0.5) + 0.05,
        "mismatched_reference": near(0.5),
        "advantages": rng.normal(size=ROWS),
        "entropy": rng.random((ROWS, COLUMNS)),
        "rewards": rng.normal(size=ROWS),
        "margin": rng.random(ROWS // 2),
        "student": 2.0 * rng.normal(size=(ROWS, COLUMNS, VOCABULARY)),
        "teacher": 2.0 * rng.normal(size=(ROWS, COLUMNS, VOCABULARY)),
    }
    return {name: x if x.dtype == bool else x.astype(np.float32) for name, x in arrays.items()}


class OneProcess:
    """Stands for an accelerator with one process."""

    num_processes, sync_gradients, device = 1, False, torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def trainer(kind, **attributes):
    """A trainer without its constructor: only the attributes that its loss reads."""
    made = object.__new__(kind)
    given = dict(
        accelerator=OneProcess(), model=types.SimpleNamespace(training=True), aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1, label_smoothing=0.0,
    )  # fmt: skip
    for name, value in {**given, **attributes}.items():
        setattr(made, name, value)
    return made


def differentiated(x, loss_of):
    """(loss, gradient) of loss_of at the array x."""
    x = torch.tensor(x, requires_grad=True)
    loss = loss_of(x)
    loss.backward()
    return loss.detach().numpy(), x.grad.numpy()


GRPO = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {}, "sapo": {}, "vespo": {},
    "cispo": {"epsilon_high": 1.2},
    "luspo": {"importance_sampling_level": "sequence"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-2, "epsilon_high": 4e-2},
    "clip_higher": {"loss_type": "dapo", "epsilon_high": 0.28},
    "delta": {"loss_type": "dapo", "delta": 1.5},
    "kl": {"loss_type": "dapo", "beta": 0.04},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.01},
}  # fmt: skip


def grpo(x, settings, name):
    """TRL's GRPO loss, of one loss_type and its knobs."""
    knobs = {"loss_type": name, "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
             "beta": 0.0, "delta": None, "entropy_coef": 0.0, **settings}  # fmt: skip
    args = types.SimpleNamespace(
        delta=knobs.pop("delta"), use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, steps_per_generation=1,
    )  # fmt: skip
    mask = torch.tensor(x["mask"]).float()
    batch = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long), "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, COLUMNS, dtype=torch.long), "completion_mask": mask,
        "advantages": torch.tensor(x["advantages"]), "old_per_token_logps": torch.tensor(x["old"]),
        "ref_per_token_logps": torch.tensor(x["reference"]), "num_items_in_batch": mask.sum(),
    }  # fmt: skip

    def loss_of(log_probs):
        made = trainer(
            GRPOTrainer, args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
            current_gradient_accumulation_steps=1, max_completion_length=COLUMNS, use_adaptive_entropy=False,
            _entropy_bonus_enabled=knobs["entropy_coef"] > 0,
            _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.tensor(x["entropy"]), None), **knobs,
        )  # fmt: skip
        return made._compute_loss(None, batch)

    return differentiated(x["log_probs"], loss_of)


def rloo(x):
    """TRL's RLOO loss: the clipped ratio of whole rows."""
    mask = torch.tensor(x["mask"]).float()
    batch = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long), "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, COLUMNS, dtype=torch.long), "completion_mask": mask,
        "advantages": torch.tensor(x["advantages"]), "old_logps": (torch.tensor(x["old"]) * mask).sum(1),
    }  # fmt: skip

    def loss_of(log_probs):
        forward = lambda *_, **__: (log_probs, torch.tensor(x["entropy"]), None)
        made = trainer(RLOOTrainer, epsilon_low=0.2, epsilon_high=0.2, _get_per_token_logps_and_entropies=forward)
        return made._compute_loss(None, batch)

    return differentiated(x["log_probs"], loss_of)


DPO = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "nca_pair": {}, "bco_pair": {}, "sppo_hard": {}, "apo_zero": {},
    "apo_down": {}, "discopop": {}, "sigmoid_norm": {}, "sft": {},
    "exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1},
}  # fmt: skip


def model_output(log_probs):
    """What TRL's models give, with the prompt's one column in front."""
    zeros = torch.zeros_like(log_probs.detach())
    return types.SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
                                 log_sum_sq_probs=zeros)  # fmt: skip


def dpo(x, settings, name):
    """TRL's DPO loss; the first half of the rows are chosen, the second half rejected."""
    mask = torch.tensor(x["mask"]).long()
    reference = (torch.tensor(x["reference"]) * mask).sum(1)
    with_prompt = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), mask], dim=1)
    batch = {
        "input_ids": torch.zeros(ROWS, COLUMNS + 1, dtype=torch.long), "completion_mask": with_prompt,
        "attention_mask": with_prompt, "ref_chosen_logps": reference[: ROWS // 2],
        "ref_rejected_logps": reference[ROWS // 2 :],
    }  # fmt: skip

    def loss_of(log_probs):
        made = trainer(
            DPOTrainer, beta=0.3, loss_types=[name], loss_weights=[1.0], ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", use_weighting=False, args=types.SimpleNamespace(discopop_tau=0.05),
            **settings,
        )  # fmt: skip
        return made._compute_loss(lambda **_: model_output(log_probs * mask), batch, False)

    return differentiated(x["log_probs"], loss_of)


def kto(x, name):
    """TRL's KTO loss; rows of the first half are desirable."""
    mask = torch.tensor(x["mask"]).long()
    total = lambda name: (torch.tensor(x[name]) * mask).sum(1)
    with_prompt = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), mask], dim=1)
    batch = {
        "input_ids": torch.zeros(ROWS, COLUMNS + 1, dtype=torch.long), "completion_mask": with_prompt,
        "attention_mask": with_prompt, "label": torch.arange(ROWS) < ROWS // 2, "ref_logps": total("reference"),
        "ref_KL_logps": total("mismatched_reference"),
    }  # fmt: skip

    def loss_of(log_probs):
        made = trainer(
            KTOTrainer, beta=0.3, loss_type=name, desirable_weight=1.0, undesirable_weight=1.5,
            precompute_ref_logps=True, calculate_KL=name == "kto", _compute_kl_logps=lambda *_: total("mismatched"),
        )  # fmt: skip
        return made._compute_loss(lambda **_: model_output(log_probs * mask), batch, False)

    return differentiated(x["log_probs"], loss_of)


def reference_free(x, kind, mean, **settings):
    """TRL's CPO, SimPO and ORPO losses, from sums or means of log-probs and the likelihood of the chosen rows."""
    mask = torch.tensor(x["even_mask"]).float()

    def loss_of(log_probs):
        rows = (log_probs * mask).sum(1) / (mask.sum(1) if mean else 1.0)
        chosen = mask[: ROWS // 2]
        nll = -(log_probs[: ROWS // 2] * chosen).sum() / chosen.sum()
        zero = torch.zeros(1)
        forward = lambda *_: (rows[: ROWS // 2], rows[ROWS // 2 :], zero, zero, nll)
        return trainer(kind, concatenated_forward=forward, **settings).get_batch_loss_metrics(None, {})[0]

    return differentiated(x["log_probs"], loss_of)


def reward_model(x, centre):
    """TRL's Bradley-Terry loss with a margin; the first half of the rows are chosen."""

    def loss_of(rewards):
        made = trainer(RewardTrainer, args=types.SimpleNamespace(center_rewards_coefficient=centre))
        batch = {"margin": torch.tensor(x["margin"]), "attention_mask": torch.ones(ROWS, 1)}
        return made.compute_loss(Callable(made.model, rewards), batch)

    return differentiated(x["rewards"], loss_of)


class Callable:
    """A model whose output is given."""

    def __init__(self, like, rewards):
        self.training, self._rewards = like.training, rewards

    def __call__(self, **_):
        return types.SimpleNamespace(logits=self._rewards[:, None])


def distillation(x, beta):
    """TRL's generalized Jensen-Shannon divergence, a mean over the mask's tokens."""
    labels = torch.where(torch.tensor(x["mask"]), 1, -100)
    teacher = torch.tensor(x["teacher"])
    count = int(x["mask"].sum())
    loss_of = lambda s: GKDTrainer.generalized_jsd_loss(s, teacher, labels, beta=beta, num_items_in_batch=count)
    return differentiated(x["student"], loss_of)


def main(out):
    """Writes every loss and gradient."""
    x = inputs()
    found = {f"grpo/{name}": grpo(x, settings, name) for name, settings in GRPO.items()}
    found["rloo/rloo"] = rloo(x)
    found |= {f"dpo/{name}": dpo(x, settings, name) for name, settings in DPO.items()}
    found |= {f"kto/{name}": kto(x, name) for name in ("kto", "apo_zero_unpaired")}
    cpo = dict(alpha=0.0, simpo_gamma=0.5)
    found["cpo/sigmoid"] = reference_free(x, CPOTrainer, False, beta=0.1, loss_type="sigmoid", cpo_alpha=1.0, **cpo)
    found["cpo/simpo"] = reference_free(x, CPOTrainer, True, beta=2.0, loss_type="simpo", cpo_alpha=0.0, **cpo)
    found["orpo/orpo"] = reference_free(x, ORPOTrainer, True, beta=0.1)
    found |= {f"reward/centre_{c}": reward_model(x, c) for c in (None, 0.01)}
    found |= {f"distillation/beta_{b}": distillation(x, b) for b in (0.0, 0.3, 0.5, 1.0)}
    arrays = {f"in/{name}": value for name, value in x.items()} | {"version": np.array(trl.__version__)}
    for name, (loss, gradient) in found.items():
        arrays |= {name: loss, f"{name}.grad": gradient}
    np.savez(out, **arrays)
    print(f"TRL {trl.__version__}: {len(found)} losses and gradients")


if __name__ == "__main__":
    main(sys.argv[1])
