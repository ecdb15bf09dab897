"""Floating-point operations of a program, counted product by product before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval


class Products(NamedTuple):
    """Operations of all matrix products in a program, on all chips together.

    outside        of those that run a fixed number of times
    inside         of those in loops that may end early, as decoding does; counted to their last turn
    turns          turns of these loops
    unknown_loops  loops that were counted once, since nothing bounds them
    """

    outside: float
    inside: float
    turns: int
    unknown_loops: int


def products(traced: core.ClosedJaxpr) -> Products:
    """The matrix products that a traced program's outputs depend on.

    A product of [m,k] and [k,n] is 2 m k n operations; a batch of b of them 2 b m k n. One in a `scan` counts as often
    as the scan is long, one in a `while` as often as the largest number allows that its condition compares with; of the
    branches of a `cond` the most expensive counts. A token through a dense decoder of n weights is 2 n operations, and
    2 x 2 n more for its gradients. Masked positions count: they are computed. Everything else (norms, softmaxes,
    samplers, the optimizer) is left out; it is below a few percent for models of some width.

    Args:
      traced: as in `jitted.trace(*arguments).jaxpr`.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _of(jaxpr)


def _of(jaxpr: Any) -> Products:
    outside, inside, turns, unknown = _of_equations(jaxpr), 0.0, 0, 0
    for equation in jaxpr.eqns:
        found = [_of(inner) for inner in _inner(equation)]
        if not found:
            continue
        if equation.primitive.name == "cond":
            found = [max(found, key=lambda one: one.outside + one.inside)]
        once, times = Products(*map(sum, zip(*found))), _times(equation)
        if equation.primitive.name == "while":
            once = _in_while(equation, once)
        outside, inside = outside + times * once.outside, inside + times * once.inside
        turns, unknown = turns + times * once.turns, unknown + once.unknown_loops
    return Products(outside, inside, turns, unknown)


def _in_while(equation: Any, once: Products) -> Products:
    """A loop's products, all of which may end early."""
    work = once.outside + once.inside
    if not work:
        return Products(0.0, 0.0, 0, 0)
    turns = _turns(equation)
    unknown = once.unknown_loops + (turns is None)
    turns = 1 if turns is None else turns
    return Products(0.0, turns * work, turns * max(1, once.turns), unknown)


def _of_equations(jaxpr: Any) -> float:
    """The products that stand in the jaxpr itself."""
    total = 0.0
    for equation in jaxpr.eqns:
        if not equation.outvars:
            continue
        name, out = equation.primitive.name, equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval
            total += 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
        elif name.startswith("ragged_dot"):  # [m,k] x [g,k,n] -> [m,n], and its gradient [m,k] x [m,n] -> [g,k,n]
            total += 2.0 * equation.invars[0].aval.size * out.shape[-1]
    return total


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _times(equation: Any) -> int:
    """How often what is inside of an equation runs, over all chips."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _turns(equation: Any) -> int | None:
    """How often a `while` runs at most; None where its condition compares with no number that is known."""
    params, condition = equation.params, equation.params["cond_jaxpr"]
    given = equation.invars
    constants = given[: params["cond_nconsts"]]
    start = given[params["cond_nconsts"] + params["body_nconsts"] :]
    outer = dict(zip(condition.jaxpr.invars, [*constants, *start]))
    outer |= dict(zip(condition.jaxpr.constvars, condition.consts))

    def number(variable: Any) -> int | None:
        variable = outer.get(variable, variable) if not isinstance(variable, core.Literal) else variable
        value = variable.val if isinstance(variable, core.Literal) else variable
        return int(value) if isinstance(value, int | np.integer | np.ndarray | jax.Array) else None

    found = []
    for one in condition.jaxpr.eqns:
        if one.primitive.name == "lt" and one.invars[0].aval.shape == ():
            first, last = map(number, one.invars)
            if last is not None:
                found.append(last - (first or 0))
    return min(found, default=None)

