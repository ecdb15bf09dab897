"""Programs a second: the warm pool of mlrl.sandbox beside a bare interpreter and a sandbox for each program.

    .venv/bin/python -m benchmarks.sandbox [programs]
"""

import statistics
import subprocess
import sys
import time

from mlrl.sandbox import Job, Pool, run

PROGRAM = "def f(x):\n    return sorted(x)[::-1]"
CALL = "f([3, 1, 2])"


def per_second(act, count, repeats=3):
    """The median over repeats of count / seconds of act(count)."""
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        act(count)
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)


def interpreters(count):
    """No isolation at all: what a process of its own costs by itself."""
    for _ in range(count):
        command = [sys.executable, "-I", "-S", "-c", f"{PROGRAM}\nprint({CALL})"]
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"[3, 2, 1]\n"


def sandboxes(count):
    for _ in range(count):
        assert run(PROGRAM, (CALL,)).answers[0].value == [3, 2, 1]


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print(f"a bare interpreter for each, one at a time   {per_second(interpreters, count // 5):6.0f} programs/s")
    print(f"a sandbox for each, one at a time            {per_second(sandboxes, count // 20):6.0f} programs/s")
    for without in ((), ("namespaces",), ("namespaces", "landlock")):
        for workers in (1, 2):
            pool = Pool(workers=workers, without=without)
            walls = ", ".join(pool.walls())

            def jobs(count, pool=pool):
                results = pool.run([Job(PROGRAM, (CALL,))] * count)
                assert all(result.answers[0].value == [3, 2, 1] for result in results)

            jobs(workers)
            print(f"a warm pool, {workers} at a time, {walls:<31} {per_second(jobs, count):6.0f} programs/s")
            pool.close()


if __name__ == "__main__":
    main()
