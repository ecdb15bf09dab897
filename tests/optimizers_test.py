"""Optimizers: two for two parts, one that waits, and the rate that is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlrl import optimizers
from mlrl.types import Refused

PARAMS = {"embedding": jnp.asarray([1.0, 2.0]), "critic": {"value": jnp.asarray([3.0, 4.0])}}
GRADS = {"embedding": jnp.asarray([3.0, 4.0]), "critic": {"value": jnp.asarray([30.0, 40.0])}}
clipped_sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))


def steps_of(optimizer, count, params=PARAMS, grads=GRADS):
    """The updates of `count` steps with the same gradients, and the last state."""
    state, made = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(count):
        step, state = update(grads, state, params)
        made.append(step)
    return made, state


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_each_part_is_clipped_by_its_own_norm():
    (step,), _ = steps_of(optimizers.policy_and_critic(policy=clipped_sgd, critic=optax.sgd(0.1)), 1)
    np.testing.assert_allclose(step["embedding"], [-0.6, -0.8], rtol=1e-6)  # not by the critic's 50
    np.testing.assert_allclose(step["critic"]["value"], [-3.0, -4.0], rtol=1e-6)
    whole, _ = steps_of(clipped_sgd, 1)
    assert abs(float(whole[0]["embedding"][0])) < 0.06  # the control: one norm for both


def test_a_value_head_on_the_policys_trunk_is_the_critics_part():
    params, grads = ({"embedding": t["embedding"], "value": t["critic"]["value"]} for t in (PARAMS, GRADS))
    two = optimizers.policy_and_critic(policy=optax.set_to_zero(), critic=optax.sgd(1.0))
    (step,), _ = steps_of(two, 1, params, grads)
    same(step, {"embedding": jnp.zeros(2), "value": jnp.asarray([-30.0, -40.0])})
    with pytest.raises(Refused, match="the model has no critic"):
        two.init({"embedding": jnp.ones(2)})


def test_the_frozen_part_does_not_move_and_then_begins_from_its_first_step():
    """Decay and a schedule included: after 3 frozen steps come the very steps of an optimizer that was not frozen."""
    rate = optimizers.warmup_then_constant(peak=0.1, warmup_steps=2)
    policy = optimizers.adamw(learning_rate=rate, weight_decay=0.1, b2=0.999)
    critic = optimizers.adamw(learning_rate=0.5)
    late = optimizers.policy_and_critic(policy=optimizers.frozen_first(optimizer=policy, steps=3), critic=critic)
    frozen, _ = steps_of(late, 6)
    free, _ = steps_of(optimizers.policy_and_critic(policy=policy, critic=critic), 6)
    for i in range(6):
        same(frozen[i]["critic"], free[i]["critic"])
        same(frozen[i]["embedding"], jnp.zeros(2) if i < 3 else free[i - 3]["embedding"])
    assert bool(free[1]["embedding"].any()) and bool(free[0]["critic"]["value"].any())


def test_frozen_for_no_step_is_not_frozen():
    late, _ = steps_of(optimizers.frozen_first(optimizer=optimizers.adamw(), steps=0), 2)
    same(late, steps_of(optimizers.adamw(), 2)[0])
    with pytest.raises(Refused, match="frozen_first.steps must be a whole number of at least 0, got 1.5"):
        optimizers.frozen_first(optimizer=optimizers.adamw(), steps=1.5)


def test_the_rate_reported_is_the_policys():
    def rate(optimizer, steps):
        return float(optimizers.current_learning_rate(steps_of(optimizer, steps)[1]))

    schedule = optimizers.warmup_then_constant(peak=0.4, warmup_steps=4)
    scheduled, constant = (optimizers.adamw(learning_rate=r) for r in (schedule, 0.25))
    assert rate(constant, 1) == 0.25
    assert [rate(scheduled, steps) for steps in (1, 2, 5, 7)] == pytest.approx([0.0, 0.1, 0.4, 0.4])
    assert rate(optimizers.policy_and_critic(policy=constant, critic=scheduled), 3) == 0.25
    late = optimizers.frozen_first(optimizer=scheduled, steps=2)
    assert rate(optimizers.policy_and_critic(policy=late, critic=constant), 4) == pytest.approx(0.1)
    assert np.isnan(rate(optax.sgd(0.1), 1))
