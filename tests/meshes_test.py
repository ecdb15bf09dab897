"""Meshes: their sizes, the table of logical axes, and what follows from it for a whole training state."""

import dataclasses
import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mlrl import axes, checkpoints, meshes, optimizers, runs
from mlrl.models.norms import LayerNorm
from mlrl.models.transformer import Config, Transformer, initialize
from mlrl.types import Refused, TrainState

DENSE = Config(vocabulary_size=24, width=16, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=24)
ALL_THREE = dict(data=2, fsdp=2, tensor=2)


@functools.cache
def shapes(config):
    return jax.eval_shape(functools.partial(initialize, Transformer(config)), jax.random.key(0))


def state_of(params, optimizer, reference=()):
    return TrainState(step=jnp.int32(3), key=jax.random.key(1), params=params, opt_state=optimizer.init(params),
                      reference=reference, curriculum={"weights": jnp.ones(4)}, reward=(), controllers={},
                      bad_updates=jnp.int32(0))  # fmt: skip


def specs(config, optimizer=optimizers.adamw(), **sizes):
    """(params, opt_state) of PartitionSpecs."""
    state = jax.eval_shape(lambda: state_of(initialize(Transformer(config), jax.random.key(0)), optimizer))
    found = meshes.state_shardings(state, meshes.mesh(**sizes))
    return jax.tree.map(lambda sharding: sharding.spec, (found.params, found.opt_state))


def test_a_size_of_0_is_what_the_others_leave():
    assert dict(meshes.mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1}
    assert meshes.mesh(data=2, fsdp=0, tensor=2).shape["fsdp"] == 2
    assert meshes.mesh(devices=4).shape["data"] == 4
    assert meshes.words(meshes.mesh(**ALL_THREE)) == "8 device(s): data 2 x fsdp 2 x tensor 2"
    assert meshes.words(meshes.mesh(devices=1)) == "1 device(s)"


def test_other_devices_may_be_given_and_the_same_ones_rearranged():
    some = jax.devices()[4:6]
    with meshes.on(some):
        chosen = meshes.mesh(data=1, tensor=0)
    assert list(chosen.devices.flat) == some and chosen.shape["tensor"] == 2
    assert meshes.mesh().size == 8
    again = meshes.rearranged(chosen, data=2)
    assert list(again.devices.flat) == some and again.shape["data"] == 2
    assert meshes.same(chosen) is chosen


def test_devices_of_several_slices_lie_along_data():
    class Device:
        def __init__(self, number, slice_index):
            self.id, self.slice_index, self.process_index = number, slice_index, 0
            self.platform, self.device_kind = "cpu", "cpu"

    devices = [Device(number, number // 4) for number in range(8)]
    with meshes.on(devices):
        made = meshes.mesh(data=2, fsdp=4)
        with pytest.raises(Refused, match="mesh.data is 1, but the devices lie in 2 slices"):
            meshes.mesh(data=1, fsdp=0)
    assert [[d.slice_index for d in row.flat] for row in made.devices] == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("sizes, words", [
    (dict(data=3), "mesh: data 3 does not multiply to 8 devices"),
    (dict(data=2, tensor=2), "mesh: data 2 x tensor 2 does not multiply to 8 devices"),
    (dict(tensor=3), "tensor 3 does not multiply to 8"),
    (dict(tensor=16), "xla_force_host_platform_device_count=N makes N devices of a CPU"),
    (dict(fsdp=0), "mesh.data and mesh.fsdp are both 0"),
    (dict(tensor=-1), "mesh.tensor must be a whole number of at least 0"),
    (dict(devices=9), "mesh.devices is 9, but only 8 devices"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(Refused, match=words):
        meshes.mesh(**sizes)


def test_parameters_are_split_by_the_table():
    params, _ = specs(DENSE, **ALL_THREE)
    assert params["embedding"]["embedding"] == P("tensor", "fsdp")
    assert params["attentions_1"]["qkv"]["kernel"] == P("fsdp", "tensor")
    assert params["attentions_1"]["out"]["kernel"] == P("tensor", None, None, "fsdp")
    assert params["mlps_0"]["gate_up"]["kernel"] == P("fsdp", None, "tensor")
    assert params["mlps_0"]["down"]["kernel"] == P("tensor", "fsdp")
    assert params["final_norm"]["scale"] == P()
    params, _ = specs(dataclasses.replace(DENSE, experts=4), data=1, fsdp=2, expert=4)
    assert params["mlps_0"]["gate_up"] == P("expert", "fsdp") and params["mlps_0"]["down"] == P("expert", None, "fsdp")
    assert all(spec == P() for spec in jax.tree.leaves(specs(DENSE, data=8)[0]))


@pytest.mark.parametrize("changes", [
    dict(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, post_norms=True, tied_head=False, value_head=True),
    dict(gated_mlp=False, mlp_bias=True, norm=LayerNorm, learned_positions=32),
    dict(experts=2, value_head=True, critic_layers=1),
])  # fmt: skip
def test_every_parameter_is_in_the_table(changes):
    config = dataclasses.replace(DENSE, **changes)
    params, _ = specs(config, **ALL_THREE)
    whole = {axes.names_of(path)[-2:] for path, spec in jax.tree_util.tree_leaves_with_path(params) if spec == P()}
    allowed = ("norm", "bias", "value", "critic")
    assert all(any(word in name for name in names for word in allowed) for names in whole), whole
    if "critic_layers" in changes:
        assert params["critic"]["attentions_0"] == params["attentions_0"]


def test_a_parameter_that_is_not_in_the_table_is_refused():
    with pytest.raises(Refused, match="parameter attentions_0/qkv/strange is split: add 'qkv/strange' to axes."):
        meshes.parameter_shardings({"attentions_0": {"qkv": {"strange": jnp.ones(8)}}}, meshes.mesh())


def test_what_the_optimizer_keeps_of_a_parameter_is_split_as_it_is():
    params, opt_state = specs(DENSE, **ALL_THREE)
    adam = opt_state[1].inner_state[0]
    assert adam.mu == params and adam.nu == params and adam.count == P()
    assert opt_state[1].hyperparams["learning_rate"] == P()
    both = optimizers.policy_and_critic(policy=optimizers.adamw(), critic=optax.sgd(0.1, momentum=0.9))
    params, opt_state = specs(dataclasses.replace(DENSE, value_head=True, critic_layers=1), both, **ALL_THREE)
    kept = {jax.tree_util.keystr(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(opt_state)}
    assert {spec for path, spec in kept.items() if path.endswith("['critic']['mlps_0']['down']['kernel']")} == {
        params["critic"]["mlps_0"]["down"]["kernel"]}  # fmt: skip
    assert sum(path.endswith("['mlps_1']['down']['kernel']") and spec == P("tensor", "fsdp")
               for path, spec in kept.items()) == 2  # fmt: skip
    _, factored = specs(DENSE, optax.adafactor(0.1, min_dim_size_to_factor=8), **ALL_THREE)
    kernel = lambda tree: tree["mlps_0"]["down"]["kernel"]  # noqa: E731  its rows and columns are no parameters
    assert kernel(factored[0].v_row) == kernel(factored[0].v_col) == P()


def test_adapters_and_the_frozen_base_are_split_as_their_kernels():
    config = dataclasses.replace(DENSE, lora_rank=4, param_dtype="int8")
    state = jax.eval_shape(lambda: state_of({}, optimizers.adamw()).replace(
        frozen=initialize(Transformer(config), jax.random.key(0))))  # fmt: skip
    found = meshes.state_shardings(state, meshes.mesh(**ALL_THREE)).frozen
    specs_of = lambda name: {k: s.spec for k, s in found["mlps_0"][name].items() if k != "kernel"}  # noqa: E731
    assert found["mlps_0"]["down"]["kernel"]["int8"].spec == P("tensor", "fsdp")
    assert found["mlps_0"]["down"]["kernel"]["scale"].spec == P(None, "fsdp")
    assert specs_of("down") == {"lora_a": P("tensor"), "lora_b": P(None, "fsdp"), "lora_scale": P()}
    assert specs_of("gate_up") == {"lora_a": P("fsdp"), "lora_b": P(None, None, "tensor"), "lora_scale": P()}
    assert found["attentions_0"]["qkv"]["lora_b"].spec == P(None, "tensor")


def test_what_does_not_divide_is_copied_and_said_once(caplog):
    odd = dataclasses.replace(DENSE, kv_heads=1, vocabulary_size=23)
    with caplog.at_level(logging.WARNING, "mlrl"):
        params, _ = specs(odd, **ALL_THREE)
    assert params["attentions_0"]["qkv"]["kernel"] == P("fsdp")
    assert params["mlps_0"]["down"]["kernel"] == P("tensor", "fsdp")
    heads, ids = sorted(record.message for record in caplog.records)
    assert heads == ("the mesh's axis tensor = 2 does not divide the kv_heads (1) of attentions_0/out/kernel and 3 "
                     "more: copied along it")  # fmt: skip
    assert "tensor = 2 does not divide the vocabulary (23) of embedding/embedding: copied" in ids


def test_arrays_are_split_as_far_as_they_divide():
    assert meshes.split(jnp.ones(3), "rows").shape == (3,)  # outside of a mesh
    with meshes.use(meshes.mesh(**ALL_THREE)):
        spec = lambda *shape: jax.jit(lambda x: meshes.split(x, "rows", "", "kv_heads"))(jnp.ones(shape)).sharding.spec  # noqa: E731
        assert spec(4, 3, 2) == P(("data", "fsdp"), None, "tensor")
        assert spec(6, 2, 3) == P("data") and spec(5, 2, 4) == P(None, None, "tensor")
        with pytest.raises(Refused, match="6 rows do not divide over 4 devices"):
            jax.jit(meshes.split_rows)(jnp.ones((6, 2)))


def test_parameters_from_the_host_go_to_their_devices_in_parts():
    host = {"mlps_0": {"down": {"kernel": np.arange(96.0, dtype=np.float32).reshape(24, 4)}}}
    with meshes.use(meshes.mesh(**ALL_THREE)):
        (there,) = jax.tree.leaves(meshes.placed(host))
        (again,) = jax.tree.leaves(meshes.placed({"mlps_0": {"down": {"kernel": there}}}))
    assert there.addressable_shards[0].data.shape == (12, 2)
    np.testing.assert_array_equal(there, host["mlps_0"]["down"]["kernel"])
    pointer = lambda x: x.addressable_shards[0].data.unsafe_buffer_pointer()  # noqa: E731
    assert pointer(there) != pointer(again), "what a loop donates must be its own"


@pytest.mark.parametrize("here, there", [
    (dict(data=1, fsdp=8), ALL_THREE), (ALL_THREE, dict(data=1, tensor=8)), (dict(data=8), dict(data=1, fsdp=8)),
])  # fmt: skip
def test_arrays_move_between_meshes_without_becoming_whole(here, there):
    params = {"attentions_0": {"qkv": {"kernel": np.arange(6144.0).reshape(16, 8, 3, 16)}},
              "final_norm": {"scale": np.arange(3.0)}}  # fmt: skip
    here = meshes.mesh(**here)
    places = [meshes.parameter_shardings(params, mesh) for mesh in (here, meshes.rearranged(here, **there))]
    move = meshes.mover(*places)
    given = jax.device_put(params, places[0])
    moved = move(given)
    assert jax.tree.map(lambda x: x.sharding, moved) == places[1]
    jax.tree.map(np.testing.assert_array_equal, moved, params)
    assert largest_array(move, given) == max(largest_shard(given), largest_shard(moved))
    at_once = jax.jit(lambda tree: tree, out_shardings=places[1])
    assert here.shape["fsdp"] == 1 or largest_array(at_once, given) == 6144, "a compiler left to itself makes it whole"


def largest_shard(tree):
    return max(x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))


def largest_array(program, *args):
    """Elements of the largest array that a device holds in a program at any time."""
    shapes = re.findall(r"\bf32\[([\d,]+)\]", program.lower(*args).compile().as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_random_parameters_are_the_same_on_every_mesh():
    config = dataclasses.replace(DENSE, layers=1)
    alone = initialize(Transformer(config), jax.random.key(0))
    with meshes.use(meshes.mesh(**ALL_THREE)) as mesh:
        split = initialize(Transformer(config), jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, split) == meshes.parameter_shardings(alone, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, split)  # of log, vectorized or not


def test_a_checkpoint_of_any_mesh_is_restored_on_any_other(tmp_path):
    params = initialize(Transformer(dataclasses.replace(DENSE, layers=1)), jax.random.key(0))
    state = state_of(params, optimizers.adamw(), jax.tree.map(lambda x: x + 1, params))
    abstract = jax.eval_shape(lambda: state)
    sizes = [dict(data=1, fsdp=8), ALL_THREE, dict(devices=1), dict(data=1, tensor=2, devices=2)]
    for number, (here, there) in enumerate(zip(sizes, sizes[1:] + sizes[:1])):
        there = meshes.mesh(**there)
        on_mesh = jax.device_put(state, meshes.state_shardings(state, meshes.mesh(**here)))
        manager = checkpoints.open_manager(tmp_path / str(number) / "checkpoints")
        checkpoints.save(manager, 3, on_mesh)
        checkpoints.close(manager)
        restored = runs.last_state(tmp_path / str(number), abstract, there)
        assert jax.tree.map(lambda x: x.sharding, restored) == meshes.state_shardings(abstract, there)
        plain = lambda s: jax.device_get(s.replace(key=jax.random.key_data(s.key)))  # noqa: E731
        jax.tree.map(np.testing.assert_array_equal, plain(state), plain(restored))
