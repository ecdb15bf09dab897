"""The roofline by hand, and the numbers of chips that it is made of."""

import math

import pytest

from mlrl.costs.chips import CHIPS, Chip, chip_of
from mlrl.costs.work import Work
from mlrl.pods.collectives import BETWEEN_SLICES, Traffic
from mlrl.pods.roofline import Held, memory_bytes, predicted
from mlrl.types import Refused

CHIP = Chip(devices=1, hbm_bytes=100.0, flops=1000.0, hbm_bandwidth=100.0, ici_bandwidth=10.0, dcn_bandwidth=1.0,
            source="made up")  # fmt: skip
QUIET = Traffic({}, 0, 0)


def test_memory_by_hand():
    """2 chips: 3 passes through 20 bytes, half of a cache of 40, and two steps of an optimizer over 50."""
    assert memory_bytes(Work(0.0, 3, 40.0, 2), Held(20.0, 50.0), 2) == 3 * 20 + 20 + 2 * 3 * 50


def test_the_slower_of_products_and_memory_counts_phase_by_phase():
    phases = {"prefill": Work(4000.0, 1), "decode": Work(400.0, 10)}
    found = predicted(phases, QUIET, Held(20.0, 0.0), CHIP, chips=2)
    assert found.phases == (("prefill", 2.0, 0.2), ("decode", 0.2, 2.0))
    assert found.seconds == 2.0 + 2.0 and found.serial == pytest.approx(4.4)


def test_links_and_network_count_when_they_are_slower():
    phases = {"update": Work(4000.0)}
    sent = Traffic({"all-gather": 50.0, "all-reduce": 20.0, BETWEEN_SLICES: 1.0}, 0, 0)
    found = predicted(phases, sent, Held(0.0, 0.0), CHIP, chips=2)
    assert (found.links, found.network, found.seconds, found.serial) == (7.0, 1.0, 7.0, 2.0 + 7.0 + 1.0)
    far = Traffic({BETWEEN_SLICES: 9.0}, 0, 0)
    assert predicted(phases, far, Held(0.0, 0.0), CHIP, chips=2).seconds == 9.0


def test_a_network_that_is_not_known_is_not_predicted():
    unknown = CHIP._replace(dcn_bandwidth=0.0)
    found = predicted({"update": Work(4000.0)}, Traffic({BETWEEN_SLICES: 9.0}, 0, 0), Held(0.0, 0.0), unknown, chips=2)
    assert math.isnan(found.network) and found.seconds == 2.0
    assert predicted({"update": Work(4000.0)}, QUIET, Held(0.0, 0.0), unknown, chips=2).network == 0.0


def test_every_chip_has_a_source_and_sane_numbers():
    for kind, chip in CHIPS.items():
        assert chip_of(f"{kind}:2x2") == (kind, chip)
        assert "docs.cloud.google.com" in chip.source
        assert 8 * 2**30 < chip.hbm_bytes < 200 * 2**30 and 1e14 < chip.flops < 1e16
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
    with pytest.raises(Refused, match="no TPU 'v9'.*v5p"):
        chip_of("v9:2x2")
