"""Stored rows as batches: whole groups, outcomes, ratings and labelled steps."""

import functools
import json

import jax
import numpy as np
import pytest

from mlrl import prompts, stored, vocabularies
from mlrl.tasks import pairs, preferences, puzzles
from mlrl.types import Refused

KEY, ONE = jax.random.key(0), np.ones(1)
SUMS = pairs.against_corrupted(puzzles.arithmetic(digits=1))
CHAINS = pairs.against_corrupted(puzzles.arithmetic(digits=1, operands=3, scratchpad=True), separator=",")
BYTES = vocabularies.byte_level()


def read(folder, row_fn, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return preferences.read(path, BYTES, row_fn=row_fn)


def draw(rows_fn, task, step, rows):
    """A step's rows on the host, from one program where the task allows it."""
    function = functools.partial(rows_fn, task, KEY, step, rows, ONE)
    return jax.device_get(jax.jit(function)() if task.in_graph else function()).check()


def said(batch, task):
    return [task.vocabulary.decode(t[m]) for t, m in zip(batch.rollout.tokens, batch.rollout.action_mask)]


def test_candidates_come_in_whole_groups_with_their_outcomes():
    batch = draw(stored.candidates, SUMS, 3, 8)
    assert batch.rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.rewards.outcome.tolist() == [1, 0] * 4 and bool(batch.rewards.scored.all())
    np.testing.assert_array_equal(batch.rewards.tokens.sum(axis=1), [1, 0] * 4)
    drawn = jax.device_get(prompts.draw(SUMS, KEY, 3, 4, ONE))
    np.testing.assert_array_equal(batch.rollout.tokens[:, : drawn.tokens.shape[1]], drawn.tokens.repeat(2, axis=0))
    target, _ = SUMS.targets(drawn.source, drawn.index)
    np.testing.assert_array_equal(batch.rollout.tokens[::2, drawn.tokens.shape[1] :], target)
    assert not bool(batch.rollout.truncated.any()) and bool((batch.mask == batch.rollout.action_mask).all())
    assert np.isnan(np.asarray(batch.rollout.behavior_log_probs)[np.asarray(batch.mask)]).all()


def test_rows_must_divide_into_groups():
    with pytest.raises(Refused, match="2 candidates a prompt, and 7 rows .*rows_per_step to a multiple of 2"):
        stored.candidates(SUMS, KEY, 0, 7, ONE)


def test_ratings_are_rows_of_their_own(tmp_path):
    batch = draw(stored.ratings, SUMS, 3, 8)
    assert batch.rollout.group.tolist() == list(range(8)) and batch.rewards.outcome.tolist() == [1, 0] * 4
    row = {"prompt": "a", "completion": "b", "label": False}
    task = read(tmp_path, preferences.ratings, row, row | {"completion": "c", "label": True})
    batch = draw(stored.ratings, task, 0, 2)
    assert dict(zip(said(batch, task), batch.rewards.outcome.tolist())) == {"b": 0.0, "c": 1.0}


def test_labelled_steps_mask_all_but_the_labels():
    batch = draw(stored.labelled_steps, CHAINS, 0, 8)
    mask, tokens = np.asarray(batch.mask), np.asarray(batch.rollout.tokens)
    comma, eos = CHAINS.vocabulary.encode(",")[0], CHAINS.vocabulary.eos_ids[0]
    assert [row[m].tolist() for row, m in zip(tokens, mask)] == [[comma, eos]] * 8
    labels = [np.asarray(batch.rewards.tokens)[b][mask[b]].tolist() for b in range(8)]
    assert labels[::2] == [[1, 1]] * 4 and all(label in ([0, 0], [1, 0]) for label in labels[1::2])
    assert float(np.asarray(batch.rewards.tokens)[~mask].sum()) == 0.0


def test_steps_without_an_outcome_are_scored_and_candidates_without_one_are_not(tmp_path):
    task = read(tmp_path, preferences.steps, {"prompt": "a", "completions": ["b"], "labels": [True]})
    assert draw(stored.labelled_steps, task, 0, 1).rewards.scored.all()
    batch = draw(stored.candidates, task, 0, 1)
    assert not bool(batch.rewards.scored.any()) and not bool(batch.mask.any())
    assert np.isfinite(np.asarray(batch.rewards.outcome)).all()


def test_demonstrations_are_those_of_prompts():
    batch = draw(stored.demonstrations, SUMS, 1, 4)
    wanted = jax.jit(lambda: prompts.demonstrations(SUMS, KEY, 1, 4, ONE))()
    jax.tree.map(np.testing.assert_array_equal, batch.rollout, wanted)
    assert bool(batch.rewards.scored.all())


def test_a_task_without_candidates_is_refused():
    with pytest.raises(Refused, match="no stored completions"):
        stored.candidates(puzzles.arithmetic(digits=1), KEY, 0, 8, ONE)
