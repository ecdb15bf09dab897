"""What chips send each other: bytes by kind of collective, read from a compiled program's text (HLO)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


class Traffic(NamedTuple):
    """What one chip sends while a program runs once.

    sent             bytes by kind; kinds that do not occur are left out
    loops            loops with collectives in them
    unknown_loops    loops that were counted once, since nothing in the text bounds them
    """

    sent: dict[str, float]
    loops: int
    unknown_loops: int


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    rest: str


def traffic(hlo: str) -> Traffic:
    """Bytes that a chip sends in one run of a compiled program.

    Every collective counts as in a ring, over n chips with an array of S bytes (whole, not a chip's part):

        all-gather, reduce-scatter, all-to-all   S (n - 1) / n
        all-reduce                               2 S (n - 1) / n
        collective-permute                       S
        between slices                           what a chip hands to the network (multi-slice programs only)

    A collective in a loop counts as often as the loop runs: its known trip count or, where the loop may end earlier
    (decoding does, when every row has ended), the largest number that its condition compares with. So this is an
    upper bound. Of a conditional's branches the one that sends most counts. An all-reduce of which each chip keeps a
    slice counts as the reduce-scatter that TPUs make of it.

    Args:
      hlo: `compiled.as_text()`, of a program split over devices.
    """
    computations, entry = _parsed(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else 1

    @functools.cache
    def of(name: str) -> Traffic:
        total = Traffic({}, 0, 0)
        for one in computations[name]:
            kind, count = _sent(one, name, devices)
            inner = [of(other) for other in _called(one)]
            if one.opcode == "conditional":
                inner = [max(inner, key=lambda branch: sum(branch.sent.values()))]
            if one.opcode == "while":
                inner = [_in_loop(inner, _trips(computations, one))]
            for more in [Traffic({kind: count} if count else {}, 0, 0), *inner]:
                total = _sum(total, more)
        return total

    return of(entry)


def _sum(one: Traffic, other: Traffic) -> Traffic:
    kinds = one.sent | other.sent
    sent = {kind: one.sent.get(kind, 0.0) + other.sent.get(kind, 0.0) for kind in kinds}
    return Traffic(sent, one.loops + other.loops, one.unknown_loops + other.unknown_loops)


def _in_loop(parts: list[Traffic], trips: int) -> Traffic:
    """What the condition and the body of a loop send in all its turns; 0 trips: nothing says how many."""
    once = functools.reduce(_sum, parts)
    if not once.sent:
        return once
    sent = {kind: (trips or 1) * count for kind, count in once.sent.items()}
    return Traffic(sent, once.loops + 1, once.unknown_loops + (trips == 0))


def _parsed(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The computations of a program by name, and which of them is the entry."""
    computations: dict[str, list[_Instruction]] = {}
    current, entry = [], ""
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif instruction := _INSTRUCTION.match(line):
            shape, rest = _split_shape(instruction[2])
            current.append(_Instruction(instruction[1], rest.partition("(")[0], shape, rest))
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """"bf16[8]{0:T(8)} add(...)" in two: the shape ends at the first space outside of brackets."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _called(one: _Instruction) -> Iterator[str]:
    if one.opcode.startswith(KINDS):  # an all-reduce applies its sum to scalars
        return
    for names in _CALLED.findall(one.rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _sent(one: _Instruction, computation: str, devices: int) -> tuple[str, float]:
    """The kind of an instruction, and the bytes it makes a chip send: 0.0 if it is no collective."""
    if one.opcode == "send" and "megascale" in one.rest:
        return BETWEEN_SLICES, _bytes(one.shape) - 4.0  # beside the array: a context of 4 bytes, and a token
    opcode, started, _ = one.opcode.partition("-start")
    kind = "all-to-all" if opcode == "ragged-all-to-all" else opcode
    if kind not in KINDS or one.opcode not in (opcode, f"{opcode}-start"):
        return "", 0.0
    n, size = _group_size(one.rest, devices), _bytes(one.shape)
    if kind == "collective-permute":
        return kind, (size - 8.0) / 2 if started else size  # beside input and output: two contexts
    if kind == "all-gather" and started:
        size *= n / (n + 1)  # both the parts and the whole
    if kind == "reduce-scatter":
        size *= n
    if kind == "all-reduce" and not computation.startswith("all-reduce-scatter"):
        size *= 2
    elif kind == "all-reduce":
        kind = "reduce-scatter"
    return kind, size * (n - 1) / n


def _bytes(shape: str) -> float:
    """Bytes of all arrays of a shape; tokens have none."""
    return sum(_BITS.get(dtype, 8) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
               for dtype, sizes in _ARRAY.findall(shape) if dtype != "token")  # fmt: skip


def _group_size(rest: str, devices: int) -> int:
    """Chips that take part together, from the forms in which groups are written."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(size or sizes[name]) for name, size in parts)
    return devices


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """How often a loop runs at most; 0 if that is not known."""
    if known := re.search(r'known_trip_count\W+n\W+(\d+)', loop.rest):
        return int(known[1])
    return _bound(computations, _first(r"condition=%([\w.\-]+)", loop.rest))


def _first(pattern: str, text: str) -> str:
    """What the group of a pattern finds first."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _bound(computations: dict[str, list[_Instruction]], condition: str) -> int:
    """The largest whole number that a condition compares with; 0 without any."""
    numbers, found = {}, [0]
    for one in computations[condition]:
        if one.opcode == "constant" and re.match(r"[su]32\[\]", one.shape):
            numbers[one.name] = int(_first(r"constant\((-?\d+)\)", one.rest))
        if one.opcode == "compare":
            found.extend(numbers.get(name, 0) for name in re.findall(r"%([\w.\-]+)", one.rest.partition(")")[0]))
        found.extend(_bound(computations, other) for other in _called(one))
    return max(found)
