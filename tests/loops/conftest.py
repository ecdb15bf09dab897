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
    shared = functools.partial(dataclasses.replace, num_steps=1, recording=runs.Recording())

    def once(make, same):
        made = {}

        def kept(parts, *more):
            key = (same(parts.experiment), *more)
            if key not in made:
                made[key] = make(parts, *more)
            return made[key]

        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "jitted", once(online.jitted, functools.partial(shared, evaluations=())))
        patch.setattr(online, "evaluator", once(online.evaluator, shared))
        yield
