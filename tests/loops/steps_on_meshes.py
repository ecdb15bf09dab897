"""Runs whole online steps on meshes and writes down what came out: python steps_on_meshes.py OUT NAME NAME ...

A process of its own, since the compiler's warnings go to its stderr, and only if something is really compiled.
"""

import dataclasses
import functools
import os
import pathlib
import pickle
import sys

HERE = pathlib.Path(__file__).resolve().parent

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "1", "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
# Devices of the CPU wait for each other in every collective, each in a thread: on a busy machine that takes time.
os.environ["XLA_FLAGS"] = ("--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
                           "--xla_cpu_use_fusion_emitters=false "
                           "--xla_cpu_collective_call_terminate_timeout_seconds=240")  # fmt: skip
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import worlds  # noqa: E402

from mlrl import meshes, runs  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.losses import policy, regularizers  # noqa: E402
from mlrl.models import remat  # noqa: E402
from mlrl.refilled import refilled  # noqa: E402

ONE = {name: dict(devices=1) for name in ("one", "one_experts", "one_scanned")}
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "all_three": dict(data=2, fsdp=2, tensor=2),
    "tensor": dict(data=2, tensor=4),
    "experts": dict(data=2, fsdp=2, expert=2),
    "sequence": dict(data=2, fsdp=2, sequence=2),
    "scanned": dict(data=2, fsdp=2, tensor=2),
}
SLOTS = {"slots": dict(data=2, fsdp=2, tensor=2)}  # rows that are refilled; the others decode all at once
SIZES = ONE | MESHES | SLOTS | {"rollouts_elsewhere": dict(data=2, fsdp=4)}
ROLLOUTS = {"rollouts_elsewhere": functools.partial(meshes.rearranged, data=4, tensor=2)}
# A vocabulary that 2 and 4 divide; the 2 key/value heads do not divide over tensor = 4.
MODEL = dataclasses.replace(worlds.TINY, heads=4, kv_heads=2, vocabulary_size=24)
STEPS = 2


def experiment(name):
    """PPO's loss and a KL to the reference, in micro-batches of half the rows."""
    model = dataclasses.replace(MODEL, experts=4, experts_per_token=2) if "experts" in name else MODEL
    if "scanned" in name:
        model = dataclasses.replace(MODEL, layers=3, scan_layers=True, remat=remat.full)
    kl = functools.partial(regularizers.kl_penalty, kl_coef=0.1)
    slots = dict(sampler=functools.partial(refilled, slots=8, check_every_steps=2)) if name in SLOTS else {}
    return worlds.sums(
        rollout_fn=functools.partial(worlds.ROLLOUT, **slots),
        mesh=functools.partial(meshes.mesh, **SIZES[name]), rollout_mesh=ROLLOUTS.get(name, meshes.same), model=model,
        evaluations=(), minibatches=1, micro_batch_rows=16, losses=(policy.ppo_clip, kl),
    )  # fmt: skip


def held_bytes(tree):
    """What the first device holds, and what there is."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(x.addressable_shards[0].data.nbytes for x in leaves), sum(x.nbytes for x in leaves)


def steps(name, folder):
    """A few steps on the mesh of this name: what was sampled in each, and the last state, on the host."""
    parts = online.prepare(experiment(name))
    with meshes.use(parts.experiment.mesh()) as mesh:
        state, sampled = online.initial_state(parts), []
        wanted = meshes.state_shardings(online.abstract_state(parts), mesh)
        whole = jax.jit(functools.partial(online.whole_step, parts), donate_argnums=0)
        run = runs.Run(folder, parts.experiment.recording)
        step = online.step_function(parts, run, online.jitted(parts)) if name in ROLLOUTS else whole
        draw = online.prompt_source(parts)
        for number in range(STEPS):
            assert jax.tree.map(lambda x: x.sharding, state) == wanted, f"{name}: step {number} moved the state"
            state, metrics, batch = step(state, draw(state, number))
            sampled.append(jax.device_get((batch.rollout.tokens, batch.rollout.behavior_log_probs, metrics)))
        assert name in ROLLOUTS or whole._cache_size() == 1, f"{name}: the second step was compiled again"
        held = {part: held_bytes(getattr(state, part)) for part in ("params", "opt_state", "reference")}
        return sampled, jax.device_get((state.params, state.opt_state)), held


def badly_split(table, tokens):
    """A lookup in a table that is split along its width, as the compiler can do it only by making all of it whole."""
    table = jax.lax.with_sharding_constraint(table, jax.sharding.PartitionSpec("tensor", "fsdp"))
    return meshes.split(jnp.take(table, tokens, axis=0), "rows")


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    print("compiling what must warn", file=sys.stderr, flush=True)
    with meshes.use(meshes.mesh(**SIZES["all_three"])):
        jax.jit(badly_split).lower(jnp.zeros((24, 16)), jnp.zeros((8, 5), jnp.int32)).compile()
    print("compiling what must not", file=sys.stderr, flush=True)
    out.write_bytes(pickle.dumps({name: steps(name, out.parent / name) for name in sys.argv[2:]}))
