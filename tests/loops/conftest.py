"""Runs of the same experiment, as of one that goes on, are compiled once in a module that asks for it."""

import dataclasses
import functools

import pytest

from mlrl import runs
from mlrl.loops import online


@pytest.fixture(scope="module")
def compiled_once():
    """Online runs that differ in their length, records and evaluations alone, of which programs know nothing, share
    what is compiled. Not for tests that count compilations of experiments that others run too.
    """
    made, make = {}, online.jitted

    def jitted(parts):
        same = dataclasses.replace(parts.experiment, num_steps=1, recording=runs.Recording(), evaluations=())
        if same not in made:
            made[same] = make(parts)
        return made[same]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "jitted", jitted)
        patch.setattr(online, "evaluator", functools.cache(online.evaluator))
        yield
