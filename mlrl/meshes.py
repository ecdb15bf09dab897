"""Device meshes, and which part of parameters, training states and rows each device holds; the table is mlrl.axes."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlrl.axes import AXES, RULES, axes_of, names_of, not_divided, spec_of
from mlrl.types import Array, Params, Refused, TrainState, require_whole

_log = logging.getLogger("mlrl")

_DEVICES: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("devices", default=())


@contextlib.contextmanager
def on(devices: Sequence[Any]) -> Iterator[None]:
    """Makes `mesh` take these devices instead of the machine's own: those of a TPU topology that is not here, say."""
    token = _DEVICES.set(tuple(devices))
    try:
        yield
    finally:
        _DEVICES.reset(token)


def mesh(*, data: int = 0, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1,
         devices: int = 0) -> Mesh:  # fmt: skip
    """A mesh of devices with the five AXES, most of them usually of size 1. See RULES for what they split.

    One of the sizes may be 0: it is what the others leave. `mesh()` splits rows over all devices and copies the
    parameters to each. Neighbours along the last axes are nearest to each other in the machine. Devices of several
    slices, which a slower network joins, lie along `data`.

    Args:
      data: splits rows.
      fsdp: splits rows, and parameters with what the optimizer keeps of them, along the model's width; a layer's are
        gathered where they are used (ZeRO-3).
      tensor: splits key/value heads, the width of MLPs, and the vocabulary.
      sequence: splits the columns of rows, in scoring and in the update.
      expert: splits the experts of a layer.
      devices: how many devices to use, the first ones; 0: all of them.
    Raises: Refused, if the sizes do not multiply to the number of devices.
    Reference: Rajbhandari et al. 2020, ZeRO; Shoeybi et al. 2019, Megatron-LM; Xu et al. 2021, GSPMD.
    """
    available = _available()
    require_whole("mesh", "devices", devices, 0)
    if devices > len(available):
        raise Refused(f"mesh.devices is {devices}, but only {len(available)} devices are present")
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence, expert)))
    chosen = available[: devices or len(available)]
    return _arranged(chosen, _shape(len(chosen), sizes))


def same(mesh: Mesh) -> Mesh:
    """The mesh itself: the identity, as `Experiment.rollout_mesh`."""
    return mesh


def rearranged(mesh: Mesh, *, data: int = 0, fsdp: int = 1, tensor: int = 1, sequence: int = 1,
               expert: int = 1) -> Mesh:  # fmt: skip
    """The same devices, in the same order, in a mesh of other sizes. See `mesh`."""
    shape = _shape(mesh.size, dict(zip(AXES, (data, fsdp, tensor, sequence, expert))))
    return Mesh(mesh.devices.reshape(shape), AXES)


def others(mesh: Mesh, *, data: int = 0, fsdp: int = 1, tensor: int = 1, sequence: int = 1,
           expert: int = 1) -> Mesh:  # fmt: skip
    """The machine's devices that `mesh` leaves out, in a mesh of these sizes: as `Experiment.rollout_mesh`, so that
    rollouts and updates have devices of their own. One number of devices must divide the other. See `mesh`.

    Raises: Refused, if it leaves out none.
    """
    taken = set(mesh.devices.flat)
    rest = [device for device in _available() if device not in taken]
    if not rest:
        raise Refused(f"the update's mesh takes all {len(taken)} devices, and rollouts are to have others: set "
                      "meshes.mesh.devices to fewer")  # fmt: skip
    if len(rest) % len(taken) and len(taken) % len(rest):
        raise Refused(f"the update's mesh has {len(taken)} devices and leaves {len(rest)} to rollouts: one of the two "
                      "must divide the other, so that weights move in parts; change meshes.mesh.devices")  # fmt: skip
    return _arranged(rest, _shape(len(rest), dict(zip(AXES, (data, fsdp, tensor, sequence, expert)))))


def _available() -> tuple[Any, ...]:
    return _DEVICES.get() or tuple(jax.devices())


def _shape(devices: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes that multiply to the number of devices."""
    for name, size in sizes.items():
        require_whole("mesh", name, size, 0)
    rest = [name for name, size in sizes.items() if size == 0]
    if len(rest) > 1:
        raise Refused(f"mesh.{rest[0]} and mesh.{rest[1]} are both 0, but only one axis can be what the others leave: "
                      f"set mesh.{rest[0]} = 1")  # fmt: skip
    given = math.prod(size for size in sizes.values() if size)
    if devices % given or (not rest and given != devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        raise Refused(f"mesh: {product or 'data 1'} does not multiply to {devices} devices: change a size, or set "
                      "one axis to 0, or mesh.devices")  # fmt: skip
    return tuple(size or devices // given for size in sizes.values())


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> Mesh:
    """Devices in a mesh, neighbours near each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)
    if shape[0] % slices:
        raise Refused(f"mesh.data is {shape[0]}, but the devices lie in {slices} slices: make it a multiple")
    inside = (shape[0] // slices, *shape[1:])
    across = (slices, *(1 for _ in AXES[1:]))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` the one that `split` and its like refer to, and gives it."""
    with jax.set_mesh(mesh):
        yield mesh


def words(mesh: Mesh) -> str:
    """How many devices, and how they are arranged."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} device(s)" + (f": {sizes}" if sizes else "")


def row_shards(mesh: Any) -> int:
    """Into how many parts rows are split."""
    return math.prod(dict(mesh.shape).get(axis, 1) for axis in RULES["rows"])


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where every leaf of a training state lives, as NamedShardings in its structure.

    Parameters, the policy's and those of frozen models, are split by the table; what the optimizer keeps of a
    parameter (of the same path and shape, as Adam's moments are) as the parameter; anything else is whole on every
    device.

    Where a size does not divide over the mesh's axis, the parameter is copied along that axis; one warning for each
    such logical axis says so.

    Args:
      state: arrays or jax.ShapeDtypeStructs.
    """
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(state, mesh))
    held = (state.params, state.reference, state.frozen, *state.reward_models)
    for line in set.union(*(not_divided(tree, mesh) for tree in held)):
        _log.warning("%s", line)
    return shardings


def parameter_shardings(params: Params, mesh: Mesh) -> Params:
    """Where every parameter lives. See `state_shardings`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _parameter_specs(params, mesh))


def row_shardings(rows: Any, mesh: Mesh) -> Any:
    """Where the rows of every leaf live, as NamedShardings: its leading axis is split, as far as it divides."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec_of(("rows",), x.shape, mesh)), rows)


def placed(params: Params) -> Params:
    """A copy of parameters, of the host's or a device's, on the current mesh, where each device gets only its part."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.array, params)
    shardings = parameter_shardings(params, mesh)
    if jax.process_count() > 1:  # each process has all of what is on a host, and no other process has to be told
        cut = lambda x, s: x if isinstance(x, jax.Array) and not x.is_fully_addressable else (  # noqa: E731
            jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x)[index]))  # fmt: skip
        params = jax.tree.map(cut, params, shardings)
    return jax.device_put(params, shardings, may_alias=False)


def read_in_parts(path: tuple[str, ...], shape: Sequence[int], read: Callable[[tuple[slice, ...]], Any]) -> Array:
    """The parameter at `path` on the current mesh, of which each process reads what its own devices hold.

    Args:
      read: a slice of each axis -> that part, as a numpy array.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.array(read(tuple(slice(0, size) for size in shape)))
    axes = axes_of(tuple(jax.tree_util.DictKey(name) for name in path))
    return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec_of(axes, shape, mesh)), read)


def mover(here: Any, there: Any) -> Callable[[Any], Any]:
    """What moves arrays from one mesh to another: of the same devices in the same order, or of none of them.

    No device ever holds more of an array than the larger of its parts here and there, but for copies of a part. Left to
    itself, a compiler makes whole on every device what it does not know how to exchange, and `jax.device_put` goes by
    way of the host. Between two splits into as many parts as there are devices it finds an exchange; so arrays are
    first cut down to such a split where they are, then exchanged, then gathered to what is wanted.

    To other devices, arrays are first split where they are as they will be there (or, if there are more devices there,
    there as they are here), so that parts go from device to device as they are. Nothing waits for anything.

    Args:
      here, there: NamedShardings in the structure of what is moved.
    """
    meshes_ = [jax.tree.leaves(shardings)[0].mesh for shardings in (here, there)]
    if not set(meshes_[0].devices.flat) & set(meshes_[1].devices.flat):
        return _carrier(here, there, *meshes_)

    def move(tree: Any) -> Any:
        for shardings in (here, there):
            tree = jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, _finest(s, x.shape)), tree, shardings)
        return tree

    return jax.jit(move, out_shardings=there)


def _carrier(here: Any, there: Any, source: Mesh, target: Mesh) -> Callable[[Any], Any]:
    """A `mover` to other devices."""
    arranged = lambda mesh, like: Mesh(mesh.devices.reshape(-1, *like.devices.shape), ("copies", *AXES))  # noqa: E731
    on = lambda mesh, shardings: jax.tree.map(lambda s: NamedSharding(mesh, s.spec), shardings)  # noqa: E731
    if source.size % target.size == 0:
        source = arranged(source, target)
        before, after = on(source, there), there
    else:
        before, after = here, on(arranged(target, source), here)
    split_here, split_there = (jax.jit(lambda tree: tree, out_shardings=s) for s in (before, there))

    def carry(tree: Any) -> Any:
        with use(source):
            tree = split_here(tree)
        tree = jax.device_put(tree, after)
        with use(target):
            return split_there(tree)

    return carry


def _finest(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """An array's split, cut further along every axis of the mesh along which it is copied, as far as sizes divide."""
    mesh, spec = sharding.mesh, sharding.spec
    parts = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    parts += [()] * (len(shape) - len(parts))
    for name in (name for name, size in mesh.shape.items() if size > 1 and name not in sum(parts, ())):
        for i, size in enumerate(shape):
            if size % math.prod(mesh.shape[axis] for axis in (*parts[i], name)) == 0:
                parts[i] += (name,)
                break
    return NamedSharding(mesh, PartitionSpec(*parts))


def rows_from_host(rows: Any) -> Any:
    """Rows that every process has on its host, on the current mesh; each process hands over those of its own devices.

    The identity in one process, where a program takes them as they are.
    """
    if jax.process_count() == 1:
        return rows

    def placed(x: Any, sharding: NamedSharding) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:  # a program made it: it is on the mesh already
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(placed, rows, row_shardings(rows, jax.sharding.get_mesh()))


def split(x: Array, *axes: str) -> Array:
    """Asks, inside jit, that an array be split over the current mesh by its logical axes, as far as they divide.

    The identity on one device and outside of a mesh. Axes that are left out, or are "", are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, x.shape, mesh))


def split_rows(tree: Any) -> Any:
    """Asks the same of the leading axis of every leaf, which are rows. Raises Refused if the rows do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else row_shards(mesh)

    def divided(x: Array) -> Array:
        if x.shape[0] % shards:
            raise Refused(f"{x.shape[0]} rows do not divide over {shards} devices: change prompts_per_step, "
                          "group_size or mesh.devices")  # fmt: skip
        return split(x, "rows")

    return jax.tree.map(divided, tree)


def split_state(state: TrainState) -> TrainState:
    """Asks the same of a training state, or of any part of one, by the table. See `state_shardings`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, _specs(state, mesh))


def split_parameters(params: Params) -> Params:
    """Asks the same of parameters, or of their gradients."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    return jax.tree.map(jax.lax.with_sharding_constraint, params, _parameter_specs(params, mesh))


def _specs(state: TrainState, mesh: Any) -> TrainState:
    held = (state.params, state.reference, state.frozen, state.reward_models)
    params, reference, frozen, reward_models = (_parameter_specs(tree, mesh) for tree in held)
    by_path = {names_of(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {names_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}

    def kept(path: tuple, leaf: Any) -> PartitionSpec:
        names = names_of(path)
        ends = (names[i:] for i in range(len(names)))
        return next((by_path[end] for end in ends if shapes.get(end) == leaf.shape), PartitionSpec())

    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    pending = jax.tree.map(lambda x: spec_of(("rows",), x.shape, mesh), state.pending)
    opt_state = jax.tree_util.tree_map_with_path(kept, state.opt_state)
    return specs.replace(params=params, reference=reference, frozen=frozen, reward_models=reward_models,
                         opt_state=opt_state, pending=pending)  # fmt: skip


def _parameter_specs(params: Params, mesh: Any) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(axes_of(path), leaf.shape, mesh), params)
