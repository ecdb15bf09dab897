"""Programs that differ in numbers only, as one program that takes the numbers.

A knob such as a learning rate, a clip range or a coefficient is a Python number wherever it is read, and becomes a
constant when a step is traced. Here the same step is traced once with each of its values, and what differs between the
traces is taken out: a constant that is not the same in all of them becomes an argument. So no part has to be written
for it, checks see plain numbers, and the merged program given the numbers of one of them is that one, operation by
operation. What is not a number, a shape or a branch taken in Python, differs otherwise and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from mlrl.types import Array

Path = tuple[Any, ...]  # where a number stands: positions and names of parameters, from the outside in
Numbers = dict[Path, Array]

# Only for derivatives, which have been taken by the time that a step is traced.
_OF_DERIVATIVES = ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "out_trees", "fun", "debug_info")
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
          "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr",
          "remat2": "jaxpr"}  # fmt: skip


class Differs(ValueError):
    """Two programs are not one, in words that end a sentence: "since ..."."""


class Merged(NamedTuple):
    """One program in the place of several.

    function  (numbers of one of them, the programs' flat arguments) -> their flat results
    numbers   of all of them, [programs, ...] each
    """

    function: Callable[..., list[Array]]
    numbers: list[np.ndarray]


def merged(programs: Sequence[ClosedJaxpr]) -> Merged:
    """The program that each of `programs` is, given its numbers. Raises Differs if they differ in more than these."""
    found: dict[Path, np.ndarray] = {}
    _align_closed(programs, (), found)
    first = programs[0]

    def function(numbers: Sequence[Array], *args: Array) -> list[Array]:
        return _evaluated(first, (), dict(zip(found, numbers, strict=True)), args)

    return Merged(function, list(found.values()))


def _align_closed(programs: Sequence[ClosedJaxpr], path: Path, found: dict[Path, np.ndarray]) -> None:
    """Notes in `found` every number that differs; raises Differs for what else does."""
    _align([program.jaxpr for program in programs], path, found)
    for i, consts in enumerate(zip(*(program.consts for program in programs), strict=True)):
        if any(c is not consts[0] for c in consts):
            _note([np.asarray(jax.device_get(c)) if _plain(c) else c for c in consts], (*path, "const", i), found)


def _plain(const: Any) -> bool:
    return not (hasattr(const, "dtype") and jnp.issubdtype(const.dtype, jax.dtypes.extended))


def _align(jaxprs: Sequence[Jaxpr], path: Path, found: dict[Path, np.ndarray]) -> None:
    numbered: list[dict[Var, int]] = [{} for _ in jaxprs]

    def same_variables(each: Sequence[Sequence[Any]], where: str, inside: Path) -> None:
        if len({len(variables) for variables in each}) > 1:
            raise Differs(f"{where} takes another number of arrays")
        for k, variables in enumerate(zip(*each)):
            if len({_kind(v.aval) for v in variables}) > 1:
                shapes = " and ".join(dict.fromkeys(v.aval.str_short() for v in variables))
                raise Differs(f"{where} has arrays of {shapes}")
            if all(isinstance(v, Literal) for v in variables):
                _note([np.asarray(v.val, v.aval.dtype) for v in variables], (*inside, k), found)
            elif any(isinstance(v, Literal) for v in variables):
                raise Differs(f"{where} takes a number in one, and in another an array that is computed")
            elif len({number.setdefault(v, len(number)) for v, number in zip(variables, numbered)}) > 1:
                raise Differs(f"{where} takes arrays from elsewhere")

    same_variables([[*j.constvars, *j.invars] for j in jaxprs], "the program", (*path, "in"))
    if len({len(j.eqns) for j in jaxprs}) > 1:
        raise Differs(f"it takes {' or '.join(dict.fromkeys(str(len(j.eqns)) for j in jaxprs))} operations")
    for i, eqns in enumerate(zip(*(j.eqns for j in jaxprs))):
        name = eqns[0].primitive.name
        if len({e.primitive for e in eqns}) > 1:
            raise Differs(f"there is {' or '.join(dict.fromkeys(e.primitive.name for e in eqns))} in the same place")
        same_variables([e.invars for e in eqns], name, (*path, i))
        _align_parameters(name, [e.params for e in eqns], (*path, i), found)
        same_variables([e.outvars for e in eqns], name, (*path, i, "out"))
    same_variables([j.outvars for j in jaxprs], "the result", (*path, "result"))


def _kind(aval: Any) -> Any:
    return (getattr(aval, "shape", None), getattr(aval, "dtype", None), type(aval).__name__)


def _align_parameters(name: str, params: Sequence[dict[str, Any]], path: Path, found: dict[Path, np.ndarray]) -> None:
    """The parameters of one operation: programs inside of it are aligned too, all else has to be equal."""
    for key in params[0]:
        if key not in _OF_DERIVATIVES:
            _align_values(f"the {key} of {name}", [p[key] for p in params], (*path, key), found)


def _align_values(what: str, values: Sequence[Any], path: Path, found: dict[Path, np.ndarray]) -> None:
    first = values[0]
    if all(value is first for value in values) and not isinstance(first, ClosedJaxpr | Jaxpr | tuple | list):
        return
    if isinstance(first, ClosedJaxpr):
        _align_closed(values, path, found)
    elif isinstance(first, Jaxpr):
        _align(values, path, found)
    elif isinstance(first, tuple | list):
        if len({len(value) for value in values}) > 1:
            raise Differs(f"{what} is {' or '.join(dict.fromkeys(map(str, values)))}")
        for i, each in enumerate(zip(*values)):
            _align_values(what, each, (*path, i), found)
    elif isinstance(first, np.ndarray | jax.Array):
        if any(not np.array_equal(first, value) for value in values[1:]):
            raise Differs(f"{what} is another")
    elif any(value != first for value in values[1:]):
        if callable(first):
            raise Differs(f"{what} is a Python function, which may depend on the value")
        raise Differs(f"{what} is {' or '.join(dict.fromkeys(map(str, values)))}")


def _note(values: Sequence[Any], path: Path, found: dict[Path, np.ndarray]) -> None:
    if any(not isinstance(value, np.ndarray) for value in values):
        raise Differs("they hold different random keys")
    if len({(value.shape, value.dtype) for value in values}) > 1:
        raise Differs(f"they hold tables of {' and '.join(dict.fromkeys(str(list(v.shape)) for v in values))}")
    if any(value.tobytes() != values[0].tobytes() for value in values[1:]):
        found[path] = np.stack(values)


def _evaluated(program: ClosedJaxpr, path: Path, numbers: Numbers, args: Sequence[Any]) -> list[Any]:
    consts = [numbers.get((*path, "const", i), const) for i, const in enumerate(program.consts)]
    return _run(program.jaxpr, path, numbers, [*consts, *args])


def _run(jaxpr: Jaxpr, path: Path, numbers: Numbers, args: Sequence[Any]) -> list[Any]:
    """The results of a program, its operations done one by one on `args`, with `numbers` where they differ."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(variables: Sequence[Any], inside: Path) -> list[Any]:
        value = lambda v, at: numbers.get(at, v.val) if isinstance(v, Literal) else env[v]  # noqa: E731
        return [value(v, (*inside, k)) for k, v in enumerate(variables)]

    for i, eqn in enumerate(jaxpr.eqns):
        inside, given = (*path, i), read(eqn.invars, (*path, i))
        # Of an operation's own numbers the path is one longer; what is longer stands in a program inside of it.
        if any(at[: len(inside)] == inside and len(at) > len(inside) + 1 for at in numbers):
            out = _run_inside(eqn, inside, numbers, given)
        else:
            out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return read(jaxpr.outvars, (*path, "result"))


def _run_inside(eqn: Any, path: Path, numbers: Numbers, given: Sequence[Any]) -> list[Any]:
    """An operation that has programs inside of it, in which numbers differ."""
    name, p = eqn.primitive.name, eqn.params

    def program(key: Any, *more: Any) -> Callable[..., list[Any]]:
        inner = p[key][more[0]] if more else p[key]
        run = _evaluated if isinstance(inner, ClosedJaxpr) else _run
        return lambda *args: run(inner, (*path, key, *more), numbers, args)

    if name in _CALLS:
        return program(_CALLS[name])(*given)
    if name == "scan":
        consts, carried = p["num_consts"], p["num_carry"]
        first, init, xs = given[:consts], given[consts : consts + carried], given[consts + carried :]

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            out = program("jaxpr")(*first, *carry, *x)
            return out[:carried], out[carried:]

        carry, ys = jax.lax.scan(body, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return [*carry, *ys]
    if name == "while":
        a, b = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        goes_on = lambda carry: program("cond_jaxpr")(*given[:a], *carry)[0]  # noqa: E731
        return jax.lax.while_loop(goes_on, lambda carry: program("body_jaxpr")(*given[a:b], *carry), given[b:])
    if name == "cond":
        branches = [program("branches", i) for i in range(len(p["branches"]))]
        return jax.lax.switch(given[0], branches, *given[1:])
    raise Differs(f"a number inside of {name} differs")
