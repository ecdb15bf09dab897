"""The table of the study of macro actions: parity with the token arm."""

import pytest

from experiments.ma_rlhf import compare

CURVES = {
    "token": [{0: 0.1, 10: 0.2, 20: 0.4}, {0: 0.9, 10: 0.7, 20: 0.6}],
    "fixed_5": [{0: 0.1, 10: 0.5, 20: 0.3}, {0: 0.2, 10: 0.3, 20: 0.4}],
}


def test_parity_is_the_first_evaluation_after_the_start_that_reaches_the_goal():
    assert [compare.parity(one, 0.5) for one in CURVES["token"] + CURVES["fixed_5"]] == [None, 10, 10, None]


def test_the_table_measures_every_arm_by_the_last_value_of_the_same_seed_s_tokens():
    token, macro = compare.table(CURVES).splitlines()[2:]
    assert token.endswith("| 20, 10 |") and macro.endswith("| 10, never |")
    # Over 20 steps: (0.225, 0.725) of token and (0.35, 0.3) of fixed_5; (0.125 - 0.425) / 2.
    assert "| 0.325 [" in macro and "| -0.150 [" in macro and "| +0.000 [" in token


def test_learned_arms_are_measured_by_their_own_token_arm():
    learned = {f"learned_{name}": runs for name, runs in CURVES.items()}
    assert [line.split("|")[2:] for line in compare.table(learned).splitlines()] == [
        line.split("|")[2:] for line in compare.table(CURVES).splitlines()]  # fmt: skip
    with pytest.raises(SystemExit, match="`learned_token`: add it to --arms"):
        compare.table({"learned_fixed_5": CURVES["fixed_5"]})


def test_the_reward_over_training_is_a_mean_over_the_steps_between_two_evaluations():
    one = {"log": {"reward": [1.0, 3.0, 5.0, 7.0, 9.0]}, "evaluations": {"0": {}, "2": {}, "5": {}}}
    assert compare.rewards(one) == {0: 1.0, 2: 2.0, 5: 7.0}


def test_without_the_token_arm_there_is_nothing_to_measure_by():
    with pytest.raises(SystemExit, match="add it to --arms"):
        compare.table({"fixed_5": CURVES["fixed_5"]})
