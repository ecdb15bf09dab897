"""Dynamic sampling: which groups stay and which are exchanged, by hand; a step fills itself in the graph and not."""

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

from mlrl import runs, selection  # noqa: E402
from mlrl.loops import online, refill  # noqa: E402
from mlrl.tasks import tables  # noqa: E402
from mlrl.types import Prompts, Refused  # noqa: E402


def rows(rewards, first_token):
    """Groups of two rows with these rewards; each prompt is marked by a token of its own."""
    groups = len(rewards) // 2
    lengths = np.arange(len(rewards))[:, None] % 3 + 1
    batch = build(np.arange(3)[None] < lengths, rewards, group=np.repeat(np.arange(groups), 2))
    mark = first_token + jnp.arange(groups)
    prompts = Prompts(mark[:, None], jnp.ones((groups, 1), bool), jnp.zeros(groups, jnp.int32), mark, ())
    return prompts, batch.rollout, batch.rewards


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_groups_with_spread_stay_and_the_others_make_room(wrap):
    old = rows([1, 0, 0, 0, 1, 1], first_token=10)  # only the first group has spread
    new = rows([0, 0, 0, 1, 1, 0], first_token=20)  # the second and the third
    exchange = wrap(lambda a, b: refill._exchanged(a, b, refill._first(a), selection.with_spread))
    (prompts, rollout, rewards), counts = exchange(old, new)
    np.testing.assert_array_equal(prompts.tokens[:, 0], [10, 21, 22])
    np.testing.assert_array_equal(rewards.outcome, [1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(rollout.group, [0, 0, 1, 1, 2, 2])
    assert counts.attempts == 2 and counts.discarded_rows == 6 and counts.tokens == 24
    metrics = refill._metrics((prompts, rollout, rewards), counts, selection.with_spread)
    kept = [1 + 2, 3 + 1, 2 + 3]  # tokens of the rows that stayed
    assert metrics["refill/discarded_tokens"] == 24 - sum(kept) and metrics["refill/filled_share"] == 1.0


def test_a_place_that_cannot_be_filled_keeps_its_rows():
    old, new = rows([0, 0, 1, 0], first_token=10), rows([1, 1, 0, 0], first_token=20)
    (prompts, *_), _ = refill._exchanged(old, new, refill._first(old), selection.with_spread)
    assert 11 in prompts.tokens[:, 0] and 10 in prompts.tokens[:, 0]


def even_sum(rollout, prompts):
    """About half of all prompts can be judged, and the others always earn 0: groups with and without spread."""
    even = prompts.example["answer_tokens"][:, 0] % 2 == 0
    first = rollout.tokens[:, prompts.tokens.shape[1]]
    return (even & (first % 2 == 0)).astype(jnp.float32)


def even_first(rollout, prompts):
    return (rollout.tokens[:, prompts.tokens.shape[1]] % 2 == 0).astype(jnp.float32)


def even_sum_on_host(completion, example):
    return float(example["answer"][0] in "02468" and completion[:1] in tuple("02468"))


def test_a_whole_step_fills_itself_and_counts(tmp_path):
    experiment = worlds.sums(reward_fn=even_sum, refill_fn=selection.with_spread, max_attempts=6, minibatches=1,
                             select_fn=selection.with_spread)  # fmt: skip
    parts = online.prepare(experiment)
    state = online.initial_state(parts)
    prompts = online.prompt_source(parts)(state, 0)
    _, metrics, batch = jax.jit(functools.partial(online.whole_step, parts))(state, prompts)
    assert 1 < metrics["refill/attempts"] <= 6 and metrics["refill/discarded_rows"] >= 32
    assert metrics["refill/filled_share"] > np.mean([0.5])  # the first draw alone fills about half
    assert metrics["kept_share"] == pytest.approx(float(metrics["refill/filled_share"]))
    assert len(np.unique(batch.rollout.group)) == 8


def test_rewards_on_the_host_refill_too(tmp_path):
    recording = runs.Recording(save_every_steps=0, samples_every_steps=0)
    experiment = worlds.sums(reward_fn=even_sum_on_host, refill_fn=selection.with_spread, max_attempts=4, num_steps=2,
                             evaluations=(), minibatches=1, recording=recording)  # fmt: skip
    with runs.Run(tmp_path, recording) as run:
        online.train(experiment, run)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "refill/attempts" in text


def test_prompts_of_one_draw_are_those_of_a_run_without_refill():
    """The data position stays an integer: draw k of step s is draw s * max_attempts + k of the task."""
    plain, refilled = (online.prompt_source(online.prepare(worlds.sums(max_attempts=n))) for n in (1, 3))
    state = online.initial_state(online.prepare(worlds.sums()))
    np.testing.assert_array_equal(plain(state, 5).tokens, refilled(state, 1, 2).tokens)


def test_a_refill_that_cannot_draw_is_refused():
    stored = tables.table([{"prompt": "1+1=", "answer": "2"}] * 64, worlds.sums().task.vocabulary, name="stored")
    with pytest.raises(Refused, match="new prompts cannot be drawn inside the step"):
        online.prepare(worlds.sums(task=stored, reward_fn=even_first, max_attempts=2, evaluations=()))
    with pytest.raises(Refused, match="max_attempts must be a whole number"):
        online.prepare(worlds.sums(max_attempts=0))
