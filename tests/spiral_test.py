"""The SPIRAL study: its files are there, and curves are read."""

import pathlib

from experiments.spiral import compare

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_every_arm_has_a_file():
    for game in compare.COLUMNS:
        for arm in compare.ARMS[1:]:
            assert (REPO / "experiments" / "spiral" / f"{game}_{arm}.gin").is_file()


def test_parts_of_a_curve():
    curve = {0: 5.0, 60: 3.0, 80: 1.0, 100: 2.0}
    assert [compare.number(curve, part) for part in ("first", "last", "late")] == [5.0, 2.0, 1.5]
