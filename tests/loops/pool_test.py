"""The pool by hand: which rows a pass draws, how the last batch is filled up, and what is said of a selection."""

import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from rewarded_rows import build  # noqa: E402

from mlrl.loops import pool  # noqa: E402

KEEP = np.array([0, 1, 1, 0, 0, 0, 1, 1], bool)


def rows(tokens=(0, 1, 2, 3, 4, 5, 6, 7)):
    """Eight rows of four groups, each known by its token; row 7 is unscored."""
    batch = build([[0, 1, 1]] * 8, [0] * 8, group=[0, 0, 1, 1, 2, 2, 3, 3], scored=[True] * 7 + [False])
    batch = batch.replace(rollout=batch.rollout.replace(tokens=np.repeat(np.array(tokens, np.int32)[:, None], 3, 1)))
    return jax.device_get(batch)


def drawn(batches):
    """For each batch: the rows it shows, those with a mask, and its group ids."""
    return [(b.rollout.tokens[:, 0].tolist(), b.mask.any(axis=1).astype(int).tolist(), b.rollout.group.tolist())
            for b in batches]  # fmt: skip


def test_selected_rows_are_drawn_once_and_the_last_batch_is_filled_up_by_masked_rows():
    order = np.array([7, 0, 6, 1, 3, 2, 5, 4])
    found = drawn(pool.batches(rows(), KEEP, order, rows=3, unit=1))
    assert found == [([7, 6, 1], [0, 1, 1], [0, 1, 2]), ([2, 0, 0], [1, 0, 0], [0, 1, 2])]  # row 7 has no reward
    assert drawn(pool.batches(rows(), np.zeros(8, bool), order, rows=3, unit=1)) == []


def test_groups_are_drawn_whole_with_the_rows_that_were_not_kept_masked_out():
    order = np.array([3, 2, 1, 0])
    (first, second) = drawn(pool.batches(rows(), KEEP, order, rows=4, unit=2))
    assert first == ([6, 7, 2, 3], [1, 0, 1, 0], [0, 0, 1, 1])
    assert second == ([0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1])


def test_filling_rows_count_as_unscored():
    *_, last = pool.batches(rows(), KEEP, np.arange(8), rows=3, unit=1)
    assert last.rewards.scored.tolist() == [False, False, False] and not last.mask.any()


def test_joined_chunks_have_group_ids_of_their_own():
    both = pool.joined([rows(), rows()])
    assert both.rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11]
    assert both.mask.shape == (16, 3)


def test_a_selection_in_numbers():
    found = pool.selection_metrics(rows(tokens=[0, 1, 2, 3, 4, 5, 6, 6]), KEEP, 2)
    assert found["selection/rows"] == 4 and found["selection/prompts_share"] == 0.75
    np.testing.assert_allclose(found["selection/distinct_per_prompt"], 1.0)  # 6 is kept twice and counts once
    nothing = pool.selection_metrics(rows(), np.zeros(8, bool), 2)
    assert set(nothing.values()) == {0.0}


def test_exploration_by_hand_leaves_out_a_prompt_with_an_unscored_row():
    """Prompts: two right and different; two right and equal; one right, whose reward is the lower; one unscored."""
    batch = build([[0, 1, 1]] * 8, [0.9, 0.5, 0.5, 0.5, 0.1, 0.4, 1, 1], group=[0, 0, 1, 1, 2, 2, 3, 3],
                  outcome=[1, 1, 1, 1, 1, 0, 1, 1], scored=[True] * 7 + [False])  # fmt: skip
    tokens = np.repeat(np.array([0, 1, 2, 2, 4, 5, 6, 7], np.int32)[:, None], 3, 1)
    found = pool.exploration_metrics(jax.device_get(batch.replace(rollout=batch.rollout.replace(tokens=tokens))), 2)
    assert found == {
        "explore/unique_right_per_prompt": np.float32(4 / 3), "explore/unique_share": np.float32(5 / 6),
        "explore/pass@1": np.float32(5 / 6), "explore/pass@2": 1.0, "exploit/best_of_2": np.float32(2 / 3),
    }  # fmt: skip
    nobody = batch.replace(rewards=batch.rewards.replace(scored=np.zeros(8, bool)))
    assert all(np.isnan(value) for value in pool.exploration_metrics(jax.device_get(nobody), 2).values())
