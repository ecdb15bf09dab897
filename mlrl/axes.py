"""Logical axes: one table of what every parameter's axes are, and which axes of a mesh split them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mlrl.types import Params, Refused

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

# Which axes of the mesh split a logical axis. All that is split follows from this table and the next.
RULES = {
    "rows": ("data", "fsdp"),
    "columns": ("sequence",),
    "width": ("fsdp",),
    "vocabulary": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}

# The logical axes of every parameter, by the last two names of its path without the numbers of layers; "" is not
# split, nor are axes that are left out. The residual stream's own vectors are small, and whole on every device.
PARAMETERS = {
    "embedding/embedding": ("vocabulary", "width"),
    "positions/embedding": ("", "width"),
    "qkv/kernel": ("width", "kv_heads"),
    "qkv/bias": ("kv_heads",),
    "out/kernel": ("kv_heads", "", "", "width"),
    "out/bias": (),
    "gate_up/kernel": ("width", "", "mlp"),
    "gate_up/bias": ("", "mlp"),
    "up/kernel": ("width", "mlp"),
    "up/bias": ("mlp",),
    "down/kernel": ("mlp", "width"),
    "down/bias": (),
    "router/kernel": ("width",),
    "mlps/gate_up": ("experts", "width", "", "mlp"),
    "mlps/down": ("experts", "mlp", "width"),
    "qkv/lora_a": ("width",),
    "qkv/lora_b": ("", "kv_heads"),
    "out/lora_a": ("kv_heads",),
    "out/lora_b": ("", "width"),
    "gate_up/lora_a": ("width",),
    "gate_up/lora_b": ("", "", "mlp"),
    "up/lora_a": ("width",),
    "up/lora_b": ("", "mlp"),
    "down/lora_a": ("mlp",),
    "down/lora_b": ("", "width"),
    "head/kernel": ("width", "vocabulary"),
    "value/kernel": (),
    "value/bias": (),
}
_WHOLE = re.compile(r"\w*norms?/\w+|\w+/lora_scale")  # norms of any kind, and scales


def names_of(path: tuple) -> tuple[str, ...]:
    """The last names of a path, back to whatever is no key of a dict."""
    names: tuple[str, ...] = ()
    for part in reversed(path):
        if not isinstance(part, jax.tree_util.DictKey):
            break
        names = (str(part.key), *names)
    return names


def axes_of(path: tuple) -> tuple[str, ...]:
    """The logical axes of the parameter at a path."""
    names = names_of(path)
    stacked = ("",) if "layers" in names[:-1] else ()  # of layers that are scanned: their axis comes first
    kind_of = lambda names: "/".join(re.sub(r"_\d+$", "", name) for name in names[-2:])  # noqa: E731
    kind = kind_of(names)
    if names[-1] in ("int8", "scale") and kind_of(names[:-1]) in PARAMETERS:  # as the kernel that they are a part of
        kind = kind_of(names[:-1])
    if kind not in PARAMETERS and not _WHOLE.fullmatch(kind):
        raise Refused(f"nothing says how the parameter {'/'.join(names)} is split: add {kind!r} to axes.PARAMETERS")
    return (*stacked, *PARAMETERS.get(kind, ()))


def divided(axis: str, size: int, mesh: Any) -> tuple[str, ...]:
    """The axes of the mesh that split a logical axis of this size: as many as divide it."""
    axes = tuple(name for name in RULES.get(axis, ()) if dict(mesh.shape).get(name, 1) > 1)
    while axes and size % math.prod(mesh.shape[name] for name in axes):
        axes = axes[:-1]
    return axes


def spec_of(axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How an array of these logical axes is split.

    In the one form that jit compares equal: no axes of size 1, and nothing after the last that is split.
    """
    parts = [divided(axis, size, mesh) for axis, size in zip(axes, shape)]
    while parts and not parts[-1]:
        parts.pop()
    return PartitionSpec(*(None if not part else part[0] if len(part) == 1 else part for part in parts))


def not_divided(params: Params, mesh: Any) -> set[str]:
    """A line for each logical axis of parameters that does not divide over the mesh."""
    found: dict[tuple[str, int], list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for axis, size in zip(axes_of(path), leaf.shape):
            wanted = math.prod(mesh.shape[name] for name in RULES.get(axis, ()))
            if wanted > 1 and names_of(path)[-1] != "scale" and not divided(axis, size, mesh):
                found.setdefault((axis, size), []).append("/".join(names_of(path)))
    lines = set()
    for (axis, size), paths in found.items():
        which = " and ".join(f"{name} = {mesh.shape[name]}" for name in RULES[axis])
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.add(f"the mesh's axis {which} does not divide the {axis} ({size}) of {paths[0]}{more}: copied along it")
    return lines
