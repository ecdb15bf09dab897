"""Drills: what must not break is tried many times, at random, and counted.

    python -m drills                   the full form of all, hours; cut and called again, it goes on
    python -m drills kills --count 20  one drill, and so many trials of it
    python -m drills --short           a few trials of each, in minutes, as CI does; writes nothing
    python -m drills files --only 17   one trial again

Writes results.json beside this file and docs/reliability.md; a drill alone renews its own rows there. The exit status
is 1 if a trial came out as it must not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "reliability.md"
NAMES = {"kills": "kills.KILLS", "ends": "ends.ENDS", "damage": "damage.DAMAGE", "files": "files.FILES",
         "programs": "programs.PROGRAMS", "rewards": "rewards.REWARDS", "soak": "soak.SOAK",
         "learning": "learning.LEARNING"}  # fmt: skip
# As the tests run: what is tried here is not how fast a program of XLA's is.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
               "JAX_COMPILATION_CACHE_DIR": str(HERE.parent / ".jax_cache"),
               "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--short", action="store_true", help="few and small trials; writes nothing")
    parser.add_argument("--count", type=int, default=0, help="trials of each drill (default: the drill's own number)")
    parser.add_argument("--steps", type=int, default=0, help="of each run of soak and learning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, metavar="NUMBER", help="one trial; writes nothing")
    given = parser.parse_args()
    unknown = sorted(set(given.drills) - set(NAMES))
    if unknown:
        parser.error(f"there is no drill {unknown[0]}: there are {', '.join(NAMES)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return run(given, given.drills or list(NAMES))


def run(given: argparse.Namespace, names: list[str]) -> int:
    """Does the drills, prints how each came out, and writes the page unless only a part was asked for."""
    from drills import page, trials

    failed, writes = 0, not given.short and given.only < 0
    for name in names:
        module, _, attribute = NAMES[name].partition(".")
        drill = getattr(importlib.import_module(f"drills.{module}"), attribute)
        count = given.count or (drill.short if given.short else drill.count)
        steps = given.steps and drill.steps[0] and given.steps or drill.steps[given.short]
        numbers = range(count) if given.only < 0 else [given.only]
        kept = trials.KEPT / f"{name}.jsonl" if writes else None
        say = lambda words: print(words, file=sys.stderr, flush=True)
        records = trials.run(drill, numbers, given.seed, steps=steps, kept=kept, say=say)
        found = page.recorded(drill, records, machine())
        failed += len(found["failures"])
        for kind, row in found["kinds"].items():
            came = ", ".join(f"{number} {word}" for word, number in row["came"].items())
            print(f"{name}, {kind}: {row['right']} of {row['trials']} as they must ({came}), {row['minutes']:.1f} min",
                  flush=True)  # fmt: skip
        if writes:
            results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            results = {one: found if one == name else results.get(one) for one in NAMES}
            results = {one: value for one, value in results.items() if value}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page.markdown(results))
    return int(failed > 0)


def machine() -> str:
    """The processor and how many cores of it there are."""
    from benchmarks.measuring import machine as measured

    found = measured()
    return f"{found['processor']}, {found['cores']} cores, Python {found['python']}, jax {found['jax']}"


if __name__ == "__main__":
    sys.exit(main())
