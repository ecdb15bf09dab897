"""Reads a random Hugging Face folder of a 1.5B shape in new processes: seconds, and memory beside what is kept.

    python -m benchmarks.imports        writes IMPORT.md beside this file; needs 3 GB of disk and 10 GB of memory
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

SHAPE = dict(vocabulary_size=151936, width=1536, layers=28, heads=12, kv_heads=2, head_width=128, mlp_width=8960,
             qkv_bias=True, rope_theta=1000000.0, norm_eps=1e-6)  # fmt: skip  of Qwen2-1.5B
WRITE = """
import sys, jax, ml_dtypes, numpy as np
from flax import traverse_util
from mlrl.models import pretrained
from mlrl.models.transformer import Config, Transformer, initialize
config = Config(**{shape}, param_dtype="bfloat16")
shapes = jax.eval_shape(lambda: initialize(Transformer(config), jax.random.key(0)))
some = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
params = jax.tree.map(lambda x: np.resize(some, x.shape), shapes)
pretrained.write(sys.argv[1], params, config)
"""
READ = """
import resource, sys, time, jax
from mlrl import meshes
from mlrl.models import pretrained
from mlrl.models.transformer import Config, Transformer
config = Config(**{shape}, param_dtype="{dtype}")
jax.devices()
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
with meshes.use(meshes.mesh(data=1, fsdp=0)):
    params = jax.block_until_ready(pretrained.start(path=sys.argv[1])(Transformer(config), jax.random.key(0)))
seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps(dict(seconds=seconds, kept=kept, peak=1024 * (after - before))))
"""


def run(code: str, folder: str, devices: int = 1) -> str:
    """What a new process prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3",
                                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}  # fmt: skip
    return subprocess.run([sys.executable, "-c", "import json\n" + code, folder], check=True, capture_output=True,
                          text=True, env=environment).stdout  # fmt: skip


def main():
    lines = ["# Import of 1.5B parameters (made by `python -m benchmarks.imports`)", "",
             "A random bf16 folder of Qwen2-1.5B's shape; the peak is what the process's memory grew by, pages of "
             "files among it.", "", "| held as | devices | seconds | kept | peak | peak / kept |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run(WRITE.format(shape=SHAPE), folder)
        for dtype, devices in (("bfloat16", 1), ("bfloat16", 4), ("float32", 1), ("float32", 4)):
            found = json.loads(run(READ.format(shape=SHAPE, dtype=dtype), folder, devices))
            kept, peak = found["kept"] / 2**30, found["peak"] / 2**30
            lines.append(f"| {dtype} | {devices} | {found['seconds']:.1f} | {kept:.2f} GiB | {peak:.2f} GiB | "
                         f"{peak / kept:.2f} |")  # fmt: skip
            print(lines[-1], flush=True)
    pathlib.Path(__file__).with_name("IMPORT.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
