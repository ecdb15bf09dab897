"""What a round samples and selects by: chosen by hand, kept in the state, followed by the sampler and the selection."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import worlds  # noqa: E402
from rewarded_rows import build  # noqa: E402

from mlrl import meshes, runs, scoring, selection  # noqa: E402
from mlrl.loops import configurations, iterated  # noqa: E402
from mlrl.loops.configurations import Configuration  # noqa: E402
from mlrl.losses import policy  # noqa: E402
from mlrl.rewards import graph  # noqa: E402
from mlrl.rollouts.greedy import with_greedy_row  # noqa: E402
from mlrl.sampling import Sampling  # noqa: E402
from mlrl.types import Refused  # noqa: E402

BALANCED = configurations.balanced(temperatures=(0.5, 2.0), thresholds=(-2.0, 0.0), target=2.0)


def rows(rewards, outcome):
    """Two groups of two different completions."""
    batch = build([[0, 1]] * 4, rewards, outcome=outcome, group=[0, 0, 1, 1])
    return batch.replace(rollout=batch.rollout.replace(tokens=jnp.arange(8).reshape(4, 2)))


# At 0.5 one row of four is right: n* is 2, so alone it gives (1/2 * 1) and beside a wrong one (1/2 * 1/2); the other
# group gives 0 where wrong rows are selected, and is left out where nothing is. At 2.0 three are right.
ANSWERS = {0.5: rows([0.5, -1.0, -1.0, -1.0], [1, 0, 0, 0]), 2.0: rows([0.5, 0.5, 0.5, -1.0], [1, 1, 1, 0])}
SCORES = {0.5: [(1 / 4 + 0) / 2, 1 / 2], 2.0: [(1 + 1 / 4) / 2, (1 + 1 / 2) / 2]}


def chosen(answers, configure=BALANCED):
    """The configuration that is chosen where the policy answers so at each temperature."""
    state = iterated.abstract_state(iterated.prepare(worlds.round_of_sums())).replace(configuration=configure.init())
    explore = lambda state: answers[float(state.configuration.temperature)]  # noqa: E731
    return [float(x) for x in configure.choose(state, explore, selection.above).configuration]


def test_the_highest_balance_is_chosen_and_ties_go_to_the_first():
    assert chosen(ANSWERS) == [2.0, 0.0, pytest.approx(3 / 4)]
    assert chosen({0.5: ANSWERS[0.5], 2.0: ANSWERS[0.5]}) == [0.5, 0.0, pytest.approx(1 / 2)]
    wrong = rows([0.5] * 4, [0] * 4)
    assert chosen({0.5: wrong, 2.0: wrong}) == [0.5, -2.0, 0.0]
    for temperature, batch in ANSWERS.items():
        limits = jnp.array([-2.0, 0.0])
        found = configurations._balances(batch, limits, 2.0, select_fn=selection.above)
        np.testing.assert_allclose(found, SCORES[temperature], rtol=1e-6)


def test_a_temperature_that_is_an_array_is_the_same_as_a_number():
    logits = jax.random.normal(jax.random.key(0), (3, 5))
    late = jax.jit(scoring.log_distribution)(logits, jnp.float32(0.7))
    np.testing.assert_allclose(late, scoring.log_distribution(logits, 0.7), rtol=1e-5)
    sampling = configurations.sampled_by(Sampling(top_k=2), Configuration(jnp.float32(0.7), *jnp.zeros(2)))
    assert sampling.chosen_late and not sampling.greedy and sampling.filtered and Sampling(0.0).greedy
    assert configurations.sampled_by(Sampling(0.3), ()) == Sampling(0.3)


def noisily(rollout, prompts):
    """Right where the completion starts with an even digit, so that even a random model is, now and then."""
    even = lambda rollout, prompts: (rollout.tokens[:, prompts.tokens.shape[1]] % 2 == 0).astype(jnp.float32)  # noqa: E731
    return graph.noisy(rollout, prompts, verifier=even)


def train(folder, num_rounds):
    recording = runs.Recording(save_every_steps=1, samples_every_steps=0)
    experiment = worlds.round_of_sums(reward_fn=noisily, configure=BALANCED, select_fn=selection.above,
                                      num_rounds=num_rounds, recording=recording)  # fmt: skip
    with runs.Run(folder, recording) as run:
        return iterated.train(experiment, run), worlds.logged(folder)


def test_a_resumed_round_chooses_and_learns_the_same_bitwise(tmp_path):
    whole, lines = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    resumed, others = train(tmp_path / "parts", 4)
    worlds.assert_same(whole, resumed)
    names = [f"configuration/{name}" for name in Configuration._fields]
    assert [[line[name] for name in names] for line in lines[1:]] == [[o[name] for name in names] for o in others[1:]]
    assert [float(x) for x in whole.configuration] == [lines[-1][name] for name in names]
    assert all(line["configuration/balance"] > 0 for line in lines[1:])


def test_a_round_is_sampled_and_selected_by_what_was_chosen(tmp_path):
    """And the learner keeps the temperature of Sampling."""
    quiet = runs.Recording(save_every_steps=0, samples_every_steps=0)
    fixed = configurations.balanced(temperatures=(2.0,), thresholds=(0.25,))
    parts = iterated.prepare(worlds.round_of_sums(reward_fn=noisily, configure=fixed, select_fn=selection.above))
    with meshes.use(parts.experiment.mesh()), runs.Run(tmp_path, quiet) as run:
        state = iterated.initial_state(parts)
        _, metrics, rows = iterated.round_function(parts, run)(state)
    mask = rows.rollout.action_mask
    score = functools.partial(scoring.score, parts.model, state.params, rows.rollout)
    said = jax.jit(functools.partial(score, temperature=2.0))().log_probs
    np.testing.assert_allclose(np.where(mask, said, 0), rows.rollout.behavior_log_probs, atol=1e-5)
    kept, reward = rows.mask.any(axis=1), rows.rewards.tokens.sum(axis=1)
    assert kept.any() and reward[kept].min() > 0.25 and metrics["selection/rows"] == kept.sum()
    assert "chosen first, on 8 prompts x 4 completions" in iterated.describe(parts)
    assert metrics["configuration/temperature"] == 2.0 and "explore/pass@4" in metrics


def test_mistakes_are_refused_before_compiling():
    cases = [
        ({}, "best_of_n has no knob"),
        ({"select_fn": selection.above, "losses": (policy.ppo_clip,)}, "compares the sampler's"),
        ({"select_fn": selection.above, "configure": configurations.balanced}, "call a function"),
        ({"select_fn": selection.above,
          "rollout_fn": functools.partial(with_greedy_row, rollout_fn=worlds.ROLLOUT)}, "set Experiment.configure"),
    ]  # fmt: skip
    for changes, words in cases:
        with pytest.raises(Refused, match=words):
            iterated.prepare(worlds.round_of_sums(**{"configure": BALANCED, **changes}))
    for knobs in ({"temperatures": ()}, {"thresholds": 0.5}, {"temperatures": (0.0, 1.0)}, {"target": 0.0}):
        with pytest.raises(Refused, match="balanced"):
            configurations.balanced(**knobs)
