"""Knobs turned by controllers: by hand, refused when they cannot work, carried in the state of a loop."""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "loops"))

import worlds  # noqa: E402

from mlrl import advantages, controllers, divergences, runs  # noqa: E402
from mlrl.loops import iterated, online  # noqa: E402
from mlrl.losses import policy, regularizers  # noqa: E402
from mlrl.types import Refused  # noqa: E402


def half(scores, batch, *, strength=1.0):
    """A loss that is its knob."""
    return strength * jnp.float32(0.5), {}


def controlled(**changes):
    annealed = divergences.annealed(0.5, decrement=0.1, minimum=0.25)
    return controllers.controlled(**{"function": half, "knob": "strength", "controller": annealed, "observed": "x",
                                     **changes})  # fmt: skip


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_a_knob_stands_at_what_the_state_says_and_turns_with_what_is_observed(wrap):
    one = controlled()
    values, state = [], one.init()
    for _ in range(4):
        values.append(float(one.bind(state)(None, None)[0]))
        state = wrap(lambda s: one.update(s, {"x": jnp.float32(0.0)}))(state)
    np.testing.assert_allclose(values, [0.25, 0.2, 0.15, 0.125], rtol=1e-6)


def test_adaptive_kl_follows_the_observed_metric_and_ignores_what_is_not_finite():
    one = controlled(controller=divergences.adaptive_kl(0.2, target=2.0, horizon=10.0, rows=5), observed="kl")
    turn = lambda seen: float(one.update(jnp.float32(0.2), {"kl": jnp.float32(seen)}))
    assert turn(2.2) == pytest.approx(0.2 * (1 + 0.1 * 0.5))
    assert turn(200.0) == pytest.approx(0.2 * (1 + 0.2 * 0.5))  # the error is held at 0.2
    assert turn(float("nan")) == pytest.approx(0.2)


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(Refused, match="half has no knob 'strenght': it has strength"):
        controlled(knob="strenght")
    with pytest.raises(Refused, match="two controllers turn the same knob"):
        online.prepare(worlds.sums(losses=(policy.ppo_clip, controlled(), controlled())))
    with pytest.raises(Refused, match="observes 'x', which this experiment does not measure: it has accuracy"):
        online.prepare(worlds.sums(losses=(policy.ppo_clip, controlled())))


def test_only_the_online_loop_lets_an_advantage_remember():
    online.prepare(worlds.sums(advantage_fn=advantages.role_conditioned()))
    with pytest.raises(Refused, match="role_conditioned, which remembers from step to step"):
        iterated.prepare(worlds.round_of_sums(advantage_fn=advantages.role_conditioned()))


def run(folder, steps, **changes):
    recording = runs.Recording(save_every_steps=2, samples_every_steps=0)
    experiment = worlds.sums(num_steps=steps, recording=recording, evaluations=(), minibatches=1, **changes)
    with runs.Run(folder, recording) as opened:
        state = online.train(experiment, opened)
    return state, [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_a_controller_rides_in_the_state_and_resumes(tmp_path):
    """The KL in the reward, steered by the raw KL per row: what Ziegler et al. 2019 do."""
    steered = controllers.controlled(
        function=functools.partial(advantages.kl_in_reward, advantage_fn=advantages.reinforce_pp), knob="kl_coef",
        controller=divergences.adaptive_kl(0.2, target=0.01, horizon=64.0, rows=32), observed="kl/reference_row",
    )  # fmt: skip
    name = "kl_in_reward.kl_coef"
    whole, lines = run(tmp_path / "whole", 4, advantage_fn=steered)
    assert lines[1][f"controller/{name}"] == pytest.approx(0.2)
    # Before the first update the policy is its reference: the KL is 0, so the knob falls by the most it may.
    assert lines[1]["kl/reference_row"] == pytest.approx(0.0, abs=1e-6)
    assert lines[2][f"controller/{name}"] == pytest.approx(0.2 * (1 - 0.2 * 32 / 64))
    assert float(whole.controllers[name]) != pytest.approx(0.2)
    run(tmp_path / "parts", 2, advantage_fn=steered)
    again, _ = run(tmp_path / "parts", 4, advantage_fn=steered)
    assert float(again.controllers[name]) == float(whole.controllers[name])
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_a_kl_in_reward_and_loss_at_once_is_refused():
    shaped = functools.partial(advantages.kl_in_reward, advantage_fn=advantages.rloo, kl_coef=0.1)
    penalty = functools.partial(regularizers.kl_penalty, kl_coef=0.1)
    with pytest.raises(Refused, match="in the reward .* and in the loss kl_penalty: it would count twice"):
        online.prepare(worlds.sums(advantage_fn=shaped, losses=(policy.ppo_clip, penalty)))
    off = functools.partial(regularizers.kl_penalty, kl_coef=0.0)
    online.prepare(worlds.sums(advantage_fn=shaped, losses=(policy.ppo_clip, off)))
