"""Optimizers: chains of optax transformations, and the learning rate they are at."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from mlrl.models.transformer import CRITIC
from mlrl.types import Array, Params, Refused, require_whole


def warmup_then_constant(*, peak: float, warmup_steps: int = 0) -> optax.Schedule:
    """Linear from 0 to `peak` in `warmup_steps` optimizer steps, then `peak`."""
    if warmup_steps == 0:
        return optax.constant_schedule(peak)
    return optax.linear_schedule(0.0, peak, warmup_steps)


def warmup_then_cosine(*, peak: float, warmup_steps: int = 0, decay_steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear from 0 to `peak`, then half a cosine down to `final` at optimizer step `decay_steps`."""
    if decay_steps <= warmup_steps:
        raise Refused(f"warmup_then_cosine.decay_steps ({decay_steps}) must exceed warmup_steps ({warmup_steps})")
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, decay_steps, final)


def adamw(*, learning_rate: float | optax.Schedule = 1e-3, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          weight_decay: float = 0.0, max_grad_norm: float = 1.0) -> optax.GradientTransformation:  # fmt: skip
    """AdamW after clipping the gradient's global norm.

    Args:
      learning_rate: a number, or a schedule of optimizer steps.
      b1: decay of the mean of gradients.
      b2: decay of the mean of their squares.
      eps: added to the root of that mean.
      weight_decay: of every parameter, times the learning rate; 0.0: none.
      max_grad_norm: the gradient's global norm is held at it; 0.0 does not clip.
    Reference: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    adam = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps", "weight_decay"))(
        learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(), adam)


def policy_and_critic(*, policy: optax.GradientTransformation,
                      critic: optax.GradientTransformation) -> optax.GradientTransformation:  # fmt: skip
    """One optimizer for the policy, another for what the values come from: each clips by its own gradients' norm.

    The critic is the trunk of Config.critic_layers and the head on it. For a value head on the policy's trunk it is
    the head alone: the trunk then moves with the policy.

    Raises: Refused for a model without values.
    """

    def parts(params: Params) -> dict[str, str]:
        if not set(CRITIC) & set(params):
            raise Refused("policy_and_critic: the model has no critic: set Config.value_head = True and "
                          "Config.critic_layers, or choose another optimizer")  # fmt: skip
        return {name: "critic" if name in CRITIC else "policy" for name in params}

    return optax.partition({"policy": policy, "critic": critic}, parts)


def frozen_first(*, optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """Moves nothing for the first `steps` optimizer steps; then `optimizer`, as from its own first step.

    As the policy's half of `policy_and_critic` it is a warm-up of the values: the critic learns them from the first
    policy's rows alone. `optimizer` sees none of the frozen steps: its moments, their bias correction and its schedule
    begin when it does, so that the first step it takes is an ordinary one. (Moments fed with zeros meanwhile would
    believe that gradients are small.) The count is in the optimizer's state, and a skipped step is not counted.

    Args:
      steps: optimizer steps, not training steps: a training step has epochs * minibatches of them; 0: never frozen.
    Reference: Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret".
    """
    require_whole("frozen_first", "steps", steps, 0)
    return optax.conditionally_mask(optimizer, lambda step: step >= steps)


def current_learning_rate(opt_state: Any) -> Array:
    """The learning rate of the last optimizer step; NaN for an optimizer that does not expose one.

    Of `policy_and_critic` it is the policy's; while that is frozen, the one it will begin with.
    """
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
    names = lambda path: [getattr(part, "key", getattr(part, "name", "")) for part in path]  # noqa: E731
    # A schedule has a state of the same name as the rate that it sets.
    rates = [rate for path, rate in found if "hyperparams" in names(path) and "critic" not in names(path)]
    return rates[0] if rates else jnp.float32(jnp.nan)
