"""Worker processes: what functions do wrong, time limits, retries, restarts, and nothing left behind."""

import functools
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from reward_behaviors import behave, spawn

from mlrl.rewards import workers
from mlrl.rewards.workers import Call, WorkerPool
from mlrl.types import Refused


def ask(pool, *completions, answer=2.0, limit=1000):
    calls = [Call(row, 0, text, {"answer": answer}) for row, text in enumerate(completions)]
    return pool.run(calls, max_failed_rows=limit)


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool([behave], timeout_seconds=0.5, workers=2)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "completion, reward",
    [("ok", 2.0), ("flood", 2.0), ("read", 0.0), ("numpy", 0.5), ("single", 0.25), ("jax", 0.0)],
)
def test_value(completion, reward):
    pool = WorkerPool([behave], timeout_seconds=5.0, workers=1)
    assert ask(pool, completion) == [({"reward": reward}, "", "")]
    pool.close()


def test_parts(pool):
    assert ask(pool, "parts") == [({"reward": 1.0, "style": 0.25}, "", "")]


@pytest.mark.parametrize(
    "completion, reason, detail",
    [
        ("raise", "raised", "KeyError: 'no such key'"),
        ("exit", "raised", "SystemExit: 3"),
        ("nan", "not_finite", "it returned nan as reward"),
        ("text", "wrong_type", "must return a number, a mapping of numbers or None, not str '0.5'"),
        ("list", "wrong_type", "not list [0.5]"),
        ("unnamed", "wrong_type", "without an entry \"reward\": ['a', 'b']"),
        ("none", "not_applicable", "it returned None"),
        ("die", "died", "exit code 3"),
        ("signal", "died", "killed by signal 11"),
        ("forge", "died", "what its worker wrote is no answer"),
        ("fill", "died", "what its worker wrote is no answer"),
        ("hang", "hung", "it ran past timeout_seconds=0.5"),
        ("sleep", "hung", "it ran past timeout_seconds=0.5"),
    ],
)
def test_reason(pool, completion, reason, detail):
    bad, good = ask(pool, completion, "ok")
    assert (bad.entries, bad.reason) == ({}, reason) and detail in bad.detail
    assert good.entries == {"reward": 2.0}  # the worker that failed, or its successor, goes on


def test_order_is_that_of_the_rows_and_a_hung_row_delays_only_itself():
    def seven_sleeps(completion, example):
        if completion == "7":
            time.sleep(60)
        return float(completion)

    pool = WorkerPool([seven_sleeps], timeout_seconds=0.5, workers=2)
    ask(pool, "0", "0")  # both processes are up
    start = time.monotonic()
    answers = ask(pool, *map(str, range(40)))
    assert time.monotonic() - start < 6.0  # two tries of 0.5 s, and one restart
    assert [a.entries.get("reward") for a in answers] == [float(i) if i != 7 else None for i in range(40)]
    pool.close()


def test_one_retry(tmp_path):
    log = tmp_path / "tries"

    def second_time_lucky(completion, example):
        with open(log, "a") as file:
            file.write(completion)
        tries = log.read_text().count(completion)
        if completion == "n" or tries < 2:
            raise OSError("not yet")
        return tries

    pool = WorkerPool([second_time_lucky], workers=1)
    lucky, never = ask(pool, "y", "n")
    assert lucky.entries == {"reward": 2.0} and never.reason == "raised"
    assert log.read_text() == "yynn"
    pool.close()


def test_stops_early_when_too_many_rows_fail(tmp_path):
    log = tmp_path / "rows"

    def fails(completion, example):
        with open(log, "a") as file:
            file.write(completion)
        raise OSError

    pool = WorkerPool([fails], workers=1)
    answers = ask(pool, *"abcdef", limit=1)
    assert [a.reason for a in answers] == ["raised"] * 2 + ["not_run"] * 4
    assert log.read_text() == "aabb"
    pool.close()


def test_memory_limit():
    pool = WorkerPool([lambda completion, example: len(bytearray(2**31))], workers=1, memory_bytes=2**29)
    (answer,) = ask(pool, "")
    assert answer.reason == "raised" and "MemoryError" in answer.detail
    pool.close()


def test_a_function_that_cannot_be_loaded_is_refused():
    class Gone:
        def __reduce__(self):
            return __import__, ("no_such_module_anywhere",)

        def __call__(self, completion, example):
            return 0.0

    with pytest.raises(Refused, match="'mine' cannot be loaded .* ModuleNotFoundError: .*no_such_module"):
        ask(WorkerPool([Gone()], name="mine"), "x")
    with pytest.raises(Refused, match="'mine': it cannot be sent to a worker process: TypeError"):
        lock = threading.Lock()
        WorkerPool([lambda completion, example: lock], name="mine")

    lock = threading.Lock()

    @functools.wraps(behave)
    def guarded(completion, example):
        with lock:
            return 1.0 - behave(completion, example)

    with pytest.raises(Refused, match="'mine': it cannot be sent to a worker process: TypeError"):
        WorkerPool([guarded], name="mine")  # never as behave alone
    assert behave("x", {"answer": 1}) == 1.0


def test_an_example_that_cannot_be_sent_is_refused(pool):
    with pytest.raises(Refused, match="row 0: its example cannot be sent"):
        ask(pool, "x", answer=lambda: 0)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_an_answer_is_never_run_as_code(pool, tmp_path):
    bad, good = ask(pool, "pickle", "ok", answer=str(tmp_path / "touched"))
    assert bad.reason == "died" and not (tmp_path / "touched").exists()
    assert good.reason == "raised"  # its answer is no number here


@pytest.mark.parametrize("said", [
    b"", b"[]", b"7", b"\xff", b"[" * 99999, b'[{}, "", ""]', b'[{"reward": "1"}, "", ""]', b'[{}, ["hung"], ""]',
])  # fmt: skip
def test_what_is_no_answer_is_said_to_be_none(said):
    with pytest.raises(ValueError, match="no answer"):
        workers._answer(said)


@pytest.mark.parametrize("end", ["close", "die"])
def test_a_process_that_left_the_group_is_ended_too(end):
    pool = WorkerPool([spawn], workers=1)
    (answer,) = ask(pool, "daemon")
    child = int(answer.entries["child"])
    assert alive(child)
    if end == "die":
        os.kill(int(answer.entries["worker"]), signal.SIGKILL)
        wait_until(lambda: not alive(int(answer.entries["worker"])))
        assert ask(pool, "ok")[0].entries["reward"] == 0.0  # by a new worker; what the old one left ends before
        assert wait_until(lambda: not alive(child))
    pool.close()
    assert wait_until(lambda: not alive(child))


@pytest.mark.parametrize("end", ["close", "drop"])
def test_nothing_is_left_behind(end):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pool = WorkerPool([spawn], timeout_seconds=0.3, workers=2)
    hung, answer, _ = ask(pool, "hang", "x", "y")
    assert hung.reason == "hung"
    processes = [int(answer.entries["child"]), int(answer.entries["worker"])]
    assert all(map(alive, processes))
    if end == "close":
        pool.close()
    del pool
    gc.collect()
    assert wait_until(lambda: not any(map(alive, processes)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """A worker in an endless loop notices that the parent was killed: kill -9 runs no clean-up."""
    code = f"""
import os, subprocess, sys
sys.path[:] = {sys.path!r}
from reward_behaviors import behave, spawn

from mlrl.rewards import workers
from mlrl.rewards.workers import Call, WorkerPool
def endless(completion, example):
    child = subprocess.Popen(["sleep", "100"])
    open({str(tmp_path / "pid")!r}, "w").write(f"{{os.getpid()}} {{child.pid}} .")
    while True: pass
WorkerPool([endless], timeout_seconds=100.0, workers=1).run([Call(0, 0, "", {{}})], max_failed_rows=1)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."), 30.0)
    worker, child, _ = (tmp_path / "pid").read_text().split()
    assert alive(worker) and alive(child)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not alive(worker) and not alive(child))


def test_works_again_after_close(pool):
    assert ask(pool, "ok")[0].entries == {"reward": 2.0}
    pool.close()
    assert ask(pool, "ok")[0].entries == {"reward": 2.0}


def test_knobs_bound_by_gin_reach_the_workers(tmp_path, monkeypatch):
    gin = pytest.importorskip("gin")
    (tmp_path / "gin_bound_reward.py").write_text(
        "def near(completion, example, *, tolerance=0.1, of=abs):\n"
        "    return float(tolerance) + of(-1)\n"
        "def double(x, *, factor=2):\n"
        "    return factor * x\n"
        "def take(f, g):\n"
        "    return f, g\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    gin.clear_config()  # another test may have left a finalized one
    gin.parse_config("""
        from __gin__ import dynamic_registration
        import gin_bound_reward
        gin_bound_reward.near.tolerance = 7.0
        scope/gin_bound_reward.near.of = @other/gin_bound_reward.double
        other/gin_bound_reward.double.factor = 10
        gin_bound_reward.take.f = @gin_bound_reward.near
        gin_bound_reward.take.g = @scope/gin_bound_reward.near
    """)
    import gin_bound_reward

    try:
        f, g = gin.get_configurable(gin_bound_reward.take)()
        pool = WorkerPool([f, functools.partial(g)], workers=1)
        answers = pool.run([Call(0, 0, "x", {}), Call(0, 1, "x", {})], max_failed_rows=0)
        assert [answer.entries for answer in answers] == [{"reward": 8.0}, {"reward": -3.0}]
        assert gin_bound_reward.near("", {}) == 1.1  # the function itself is as it was
        assert "near.tolerance = 7.0" in gin.operative_config_str()  # the knobs count as used
        pool.close()
    finally:
        gin.clear_config()


def test_an_interrupt_ends_the_workers_and_the_pool_still_works(pool, request):
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, heard))
    before = threading.active_count()
    slow = WorkerPool([behave], timeout_seconds=100.0, workers=2)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(slow, "hang", "sleep", "ok")
    timer.join()
    assert time.monotonic() - start < 5.0 and threading.active_count() == before
    assert ask(slow, "ok")[0].entries == {"reward": 2.0}
    slow.close()
