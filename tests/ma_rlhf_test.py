"""The table of the study of macro actions: parity with the token arm."""

from experiments.ma_rlhf import compare

CURVES = {
    "token": [{0: 0.1, 10: 0.2, 20: 0.4}, {0: 0.9, 10: 0.7, 20: 0.6}],
    "fixed_5": [{0: 0.1, 10: 0.5, 20: 0.3}, {0: 0.2, 10: 0.3, 20: 0.4}],
}


def test_parity_is_the_first_evaluation_after_the_start_that_reaches_the_goal():
    assert [compare.parity(one, 0.5) for one in CURVES["token"] + CURVES["fixed_5"]] == [None, 10, 10, None]


def test_the_table_measures_every_arm_by_the_tokens_last_mean():
    text = compare.table(CURVES, {"token": 1.0, "fixed_5": 2.0})
    assert "steps to 0.500" in text
    assert "| never, 10 | 1.0 |" in text and "| 10, never | 2.0 |" in text
