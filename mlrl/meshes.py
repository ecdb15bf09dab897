"""Device meshes and where things live on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlrl.types import Refused


def data_mesh(*, devices: int = 0) -> Mesh:
    """A mesh with one axis, "data": rows are split over it, parameters are copied to every device.

    Args:
      devices: how many devices to use; 0 uses all of them.
    """
    available = jax.devices()
    if devices > len(available):
        raise Refused(f"data_mesh.devices is {devices}, but only {len(available)} devices are present")
    chosen = available[: devices or len(available)]
    return Mesh(np.asarray(chosen), ("data",))


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the one that `split_rows` refers to, and gives it."""
    with jax.set_mesh(mesh):
        yield mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_rows(tree: Any) -> Any:
    """Asks, inside jit, that the leading axis of every leaf be split over the current mesh's data axis.

    The identity on one device and outside of a mesh. Raises Refused if the rows do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = dict(mesh.shape).get("data", 1) if not mesh.empty else 1
    if shards == 1:
        return tree

    def constrain(x: jax.Array) -> jax.Array:
        if x.shape[0] % shards:
            raise Refused(f"{x.shape[0]} rows do not divide over {shards} devices: change prompts_per_step, "
                          "group_size or data_mesh.devices")  # fmt: skip
        return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))

    return jax.tree.map(constrain, tree)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host or device arrays on the mesh; every leaf gets a mesh sharding, Adam's counter too."""
    return jax.tree.map(lambda x: jax.device_put(jnp.asarray(x), sharding), tree)
