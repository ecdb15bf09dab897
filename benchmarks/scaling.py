"""What a device holds and sends in an update, on 1 to 8 devices with the same rows on each, beside the formula.

    python -m benchmarks.scaling        writes SCALING.md beside this file; compiles only, for virtual CPU devices

Seconds of virtual devices say nothing. What a compiled program holds and sends is exact.
"""

import functools
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402

from benchmarks.pods import blank  # noqa: E402
from mlrl import meshes  # noqa: E402
from mlrl.loops import online  # noqa: E402
from mlrl.losses.policy import ppo_clip  # noqa: E402
from mlrl.models import remat  # noqa: E402
from mlrl.models.transformer import Config, parameter_count  # noqa: E402
from mlrl.pods import ahead, collectives  # noqa: E402
from mlrl.rollouts.single_turn import single_turn  # noqa: E402

MODEL = Config(vocabulary_size=2048, width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1408,
               scan_layers=True, remat=remat.full)  # fmt: skip
PROMPTS, GROUP, PROMPT, COMPLETION = 4, 4, 32, 32  # on each device
MESHES = {"data": lambda n: dict(data=n), "fsdp": lambda n: dict(data=1, fsdp=n)}


def update(kind: str, devices: int):
    """(bytes of arguments, of temporaries, sent by a device) of an update on a mesh of this kind."""
    experiment = online.Experiment(
        task=blank.prompts(prompt_tokens=PROMPT, ids=1000), reward_fn=blank.nothing(), model=MODEL, num_steps=1,
        rollout_fn=functools.partial(single_turn, max_completion_tokens=COMPLETION), prompts_per_step=PROMPTS * devices,
        group_size=GROUP, mesh=functools.partial(meshes.mesh, **MESHES[kind](devices), devices=devices),
        score_chunk_columns=8, losses=(ppo_clip,),
    )  # fmt: skip
    program = online.programs(online.prepare(experiment))["update"]
    with meshes.use(program.mesh):
        compiled = program.function.lower(*ahead.placed(program.arguments, program.mesh)).compile()
    memory, sent = compiled.memory_analysis(), collectives.traffic(compiled.as_text())
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes, sum(sent.sent.values())


def formula(kind: str, devices: int) -> tuple[float, float]:
    """(bytes of the state, bytes sent) of a device, with P bytes of parameters.

    State: P and two moments, 3 P, or 3 P / n where they are split. Sent: prompts and rows are read apart, and for each
    of the two the gradients are summed, 2 P (n - 1) / n; with fsdp parameters are gathered for the forward pass, for
    its repetition and for the backward pass, and gradients summed into parts, 4 P (n - 1) / n. Keys and values of all
    prompts, K bytes, which grow with n, go to every device, forward and for the repetition, and their gradients are
    summed: 4 K (n - 1) / n.
    """
    p, share = 4.0 * parameter_count(MODEL), (devices - 1) / devices
    k = 4.0 * PROMPTS * devices * PROMPT * MODEL.layers * 2 * MODEL.kv_heads * MODEL.head_width
    held, weights = (3 * p, 4 * p) if kind == "data" else (3 * p / devices, 8 * p)
    return held, (weights + 4 * k) * share


def main():
    mib = lambda count: f"{count / 2**20:.1f}"  # noqa: E731
    lines = [
        "# Held and sent by a device (made by `python -m benchmarks.scaling`)", "",
        f"An update of a model of {parameter_count(MODEL):,} parameters, {PROMPTS} prompts x {GROUP} rows of {PROMPT} "
        f"+ {COMPLETION}", f"tokens on each device; MiB; jax {jax.__version__}, compiled for virtual CPU "
        "devices.", "",
        "| mesh | devices | arguments | state by the formula | temporaries | sent | sent by the formula |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind in MESHES:
        for devices in (1, 2, 4, 8):
            (arguments, temporaries, sent), (state, wanted) = update(kind, devices), formula(kind, devices)
            lines.append(f"| {kind} | {devices} | {mib(arguments)} | {mib(state)} | {mib(temporaries)} | {mib(sent)} | "
                         f"{mib(wanted)} |")  # fmt: skip
            print(lines[-1], flush=True)
    lines += ["", "Keys and values of all prompts go to every device: that is what grows beyond (n - 1) / n. Rows that",
              "are read whole (`forward = scoring.whole_rows()`) do without."]  # fmt: skip
    pathlib.Path(__file__).with_name("SCALING.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
