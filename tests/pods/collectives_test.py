"""Bytes that chips send, counted in programs by hand and in programs of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlrl.pods.collectives import BETWEEN_SLICES, traffic

# In the words of a TPU's compiler. 4 chips; every array is 1 KiB large, or is said to be.
PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[256]) -> f32[64] {
  %input = f32[256]{0:T(256)} parameter(0)
  %all-reduce.1 = f32[256]{0:T(256)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[64]{0:T(256)} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={64}
}

%quiet (q: f32[256]) -> f32[256] {
  ROOT %q = f32[256]{0} parameter(0)
}

%loud (l: f32[256]) -> f32[256] {
  %l = f32[256]{0} parameter(0)
  ROOT %turned = f32[256]{0} collective-permute(%l), source_target_pairs={{0,1},{1,0}}
}

%body.1 (carry: (s32[], bf16[512])) -> (s32[], bf16[512]) {
  %carry = (s32[]{:T(128)}, bf16[512]{0:T(512)(2,1)}) parameter(0)
  %whole = bf16[512]{0:T(512)(2,1)S(1)} all-gather(%part), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}
  %reduced = f32[64]{0:T(256)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="x"}
  ROOT %next = (s32[]{:T(128)}, bf16[512]{0:T(512)(2,1)}) tuple(%one, %whole)
}

%condition.1 (carry.1: (s32[], bf16[512])) -> pred[] {
  %bound = s32[]{:T(128)} constant(10)
  %other = s32[]{:T(128)} constant(99)
  %done = pred[]{:T(512)} all-reduce(%mine), replica_groups={{0,1,2,3}}, to_apply=%add
  %less = pred[]{:T(512)} compare(%step, %bound), direction=LT
  ROOT %and = pred[]{:T(512)} and(%less, %done)
}

%body.2 (carry.2: (s32[])) -> (s32[]) {
  %moved = u8[1024]{0} collective-permute(%old), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %next.2 = (s32[]) tuple(%one)
}

%condition.2 (carry.3: (s32[])) -> pred[] {
  ROOT %flag = pred[] get-tuple-element(%carry.3), index=0
}

ENTRY %main (p: bf16[512]) -> bf16[512] {
  %loop.1 = (s32[]{:T(128)}, bf16[512]{0:T(512)(2,1)}) while(%start), condition=%condition.1, body=%body.1
  %loop.2 = (s32[]) while(%start.2), condition=%condition.2, body=%body.2
  %exchanged = s8[4,256]{1,0} all-to-all(%p.1), replica_groups=[2,2]<=[4], dimensions={0}
  %started = (bf16[128]{0}, bf16[512]{0}) all-gather-start(%p.2), replica_groups={{0,1,2,3}}, dimensions={0}
  %finished = bf16[512]{0} all-gather-done(%started)
  %shard = f32[64]{0} reduce-scatter(%p.3), replica_groups={}, dimensions={0}, to_apply=%add
  %one.of = f32[256]{0} conditional(%which, %p.5, %p.6), branch_computations={%quiet, %loud}
  %sent = (bf16[512]{0}, u32[], token[]) send(%p.4, %after), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %result = bf16[512]{0} get-tuple-element(%loop.1), index=1
}
"""  # noqa: E501


def test_a_program_by_hand():
    found = traffic(PROGRAM)
    kib = 1024
    assert found.sent == {
        "all-gather": 10 * kib / 2 + kib * 3 / 4,  # 2 chips in a loop of 10; 4 chips once
        "reduce-scatter": 10 * kib * 3 / 4 + kib * 3 / 4,  # as an all-reduce that is sliced; as one
        "all-reduce": 10 * 2 * 3 / 4,  # one byte, each time that the loop asks whether to go on
        "collective-permute": kib + kib,  # in a loop that nothing bounds; in one of two branches
        "all-to-all": kib / 2,
        BETWEEN_SLICES: kib,
    }
    assert found.loops == 2 and found.unknown_loops == 1


def test_what_a_trip_count_or_a_group_says_is_read():
    """Each changed word changes the count: the test can fail."""
    gathered = lambda text: traffic(text).sent["all-gather"]  # noqa: E731
    longer = PROGRAM.replace("constant(10)", "constant(20)")
    assert gathered(longer) - gathered(PROGRAM) == 10 * 512
    known = PROGRAM.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"30"}}')
    assert gathered(known) - gathered(PROGRAM) == 20 * 512
    wider = PROGRAM.replace("mesh['a'=2,'b'=2] {'a'}", "mesh['a'=2,'b'=2] {'a','b'}")
    assert gathered(wider) - gathered(PROGRAM) == 10 * 256
    split = PROGRAM.replace("mesh['a'=2,'b'=2] {'a'}", "mesh['a'=4] {'a':(1)2}")
    assert gathered(split) == gathered(PROGRAM)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def compiled(function, mesh, *arguments):
    placed = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arguments]
    return jax.jit(function).lower(*placed).compile().as_text()


def test_a_compiled_loop_gathers_its_weights(mesh):
    """Weights [64,128] in 8 parts, gathered in each of 7 layers; then a sum over all 8 devices."""
    everywhere = ("data", "fsdp")
    weights, rows = ((7, 64, 128), PartitionSpec(None, None, everywhere)), ((16, 64), PartitionSpec(everywhere))

    def layers(weights, x):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ whole) @ whole.T, None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    found = traffic(compiled(layers, mesh, weights, rows))
    assert found.sent == {"all-gather": 7 * 64 * 128 * 4 * 7 / 8, "all-reduce": 2 * 4 * 7 / 8}
    assert found.loops == 1 and found.unknown_loops == 0


def test_a_program_of_one_device_sends_nothing():
    assert traffic(jax.jit(jnp.tanh).lower(jnp.ones(3)).compile().as_text()).sent == {}
