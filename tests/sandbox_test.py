"""The sandbox: hostile programs behind every set of walls, honest programs, limits, and nothing left behind."""

import contextlib
import gc
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest
from hostile_programs import ENDLESS, QUICK, UNFILTERED

from mlrl import sandbox
from mlrl.sandbox import pool as pool_lib
from mlrl.sandbox.pool import Pool
from mlrl.sandbox.results import Job, Limits, message_of
from mlrl.types import Refused

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the walls are those of Linux")
REPO = pathlib.Path(__file__).resolve().parent.parent
MODES = {  # what stands: what is given up
    "all": (),
    "landlock and seccomp": ("namespaces",),
    "seccomp": ("namespaces", "landlock"),
    "namespaces": ("landlock", "seccomp"),
    "language": ("namespaces", "landlock", "seccomp"),
}
WORDS = "what nobody may read"


def programs_alive(pool):
    """Processes beneath the pool's servers that are not the servers themselves."""
    servers = [psutil.Process(server.process.pid) for server in pool._slots if server is not None]
    if "namespaces" in pool.walls():
        servers = [inner for outer in servers for inner in outer.children()]
    return [program for server in servers for program in server.children(recursive=True)]


def still_alive(processes, seconds=5.0):
    """Those of the processes that still run after some time; one that only waits to be reaped does not run."""
    deadline = time.monotonic() + seconds
    while processes and time.monotonic() < deadline:
        alive = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                alive += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        processes = alive
        time.sleep(0.01)
    return processes


@pytest.fixture(scope="module", params=MODES)
def world(request, tmp_path_factory):
    """(mode, results by program, pools after all programs ran, secret, target) for each set of walls."""
    folder = tmp_path_factory.mktemp("world")
    folder.chmod(0o777)
    secret, target, results, pools = folder / "secret", folder / "target", {}, []
    secret.write_text(WORDS)
    secret.chmod(0o666)
    text = lambda program: program.replace("SECRET", str(secret)).replace("TARGET", str(target))  # noqa: E731
    for programs, seconds, workers in ((ENDLESS, 0.4, 6), (QUICK, 6.0, 4)):
        limits = Limits(seconds=seconds, cpu_seconds=5, memory_bytes=64 << 20)
        pools.append(Pool(limits, workers=workers, without=MODES[request.param]))
        try:
            found = pools[-1].run([Job(text(program), ("f()",)) for program, *_ in programs.values()])
        except Refused as error:
            pytest.skip(str(error))
        results |= dict(zip(programs, found))
    yield request.param, results, pools, secret, target
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def pool():
    """Two programs at once, behind whatever this system has."""
    with contextlib.closing(Pool(Limits(seconds=5.0), workers=2)) as pool:
        yield pool


def test_every_hostile_program_ends_with_its_status(world):
    mode, results, *_ = world
    wrong = {}
    for name, (_, walls, language) in (ENDLESS | QUICK).items():
        allowed = language if mode == "language" else walls
        if mode == "namespaces" and name in UNFILTERED:
            allowed = allowed | {"ok", "not_a_value"}
        if results[name].status not in allowed:
            wrong[name] = results[name]
    assert wrong == {}


def test_no_program_got_at_anything(world):
    _, results, _, secret, target = world
    shown = {name: result for name, result in results.items() if WORDS in repr(result) or "root:" in repr(result)}
    assert shown == {}
    assert secret.read_text() == WORDS and secret.stat().st_mode & 0o777 == 0o666
    assert [path.name for path in target.parent.iterdir()] == ["secret"]


def test_no_program_is_alive_and_no_scratch_is_left(world):
    _, _, pools, *_ = world
    for pool in pools:
        assert programs_alive(pool) == []
        for server in filter(None, pool._slots):
            assert os.listdir(server.scratch.name) == []


def test_the_servers_of_a_pool_survive_its_programs(world):
    _, _, pools, *_ = world
    before = [server.process.pid for server in pools[1]._slots]
    results = pools[1].run([Job("def f(): return 1", ("f()",))] * 8)
    assert [result.answers[0].value for result in results] == [1] * 8
    assert [server.process.pid for server in pools[1]._slots] == before


def test_closing_leaves_no_process_no_descriptor_and_no_folder():
    gc.collect()
    before, threads = set(os.listdir("/proc/self/fd")), psutil.Process().num_threads()
    pool = Pool(workers=3)
    pool.run([Job("x = 1")] * 6)
    servers = [psutil.Process(server.process.pid) for server in pool._slots]
    family = [process for server in servers for process in (server, *server.children(recursive=True))]
    folders = [server.scratch.name for server in pool._slots]
    pool.close()
    assert len(folders) == 3 and not any(map(os.path.exists, folders))
    assert still_alive(family) == []
    assert set(os.listdir("/proc/self/fd")) == before and psutil.Process().num_threads() == threads
    assert pool.run([Job("x = 1")])[0].status == "ok"  # it starts again
    pool.close()


def test_servers_and_programs_end_with_the_process_that_made_them():
    source = (
        "from mlrl.sandbox import Job, Limits, Pool\npool = Pool(Limits(seconds=60.0), workers=1)\n"
        "pool.run([Job('x = 1')])\nprint(pool._slots[0].process.pid, flush=True)\n"
        "pool.run([Job('while True: pass')])"
    )
    maker = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=REPO)
    server = psutil.Process(int(maker.stdout.readline()))
    deadline = time.monotonic() + 10
    while len(family := [server, *server.children(recursive=True)]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # the program runs
    family = [server, *server.children(recursive=True)]
    maker.kill()
    maker.wait()
    maker.stdout.close()
    assert still_alive(family) == []


def test_values_come_back_as_they_were(pool):
    written = ("1, 2.5, -3, True, None, 'é\\ud800', b'\\xff', 10**40, 1j", "{(1, 2): {'a': [None]}}",
               "[(1, [2]), {3: {4, 5}}, frozenset({6})]", "float('inf'), 1.0, 0.1",
               "__import__('collections').Counter('aab')")  # fmt: skip
    (result,) = pool.run([Job("", written)])
    assert [answer.value for answer in result.answers] == [eval(text) for text in written]
    assert type(result.answers[0].value[3]) is bool and type(result.answers[3].value[1]) is float


def test_a_value_is_read_without_its_own_methods(pool):
    lie = ("class T(tuple):\n    def __iter__(self): return iter(['forged'])\n    def __eq__(self, o): return True\n"
           "class S(str):\n    def __str__(self): return 'forged'\n    __repr__ = __str__")  # fmt: skip
    (result,) = pool.run([Job(lie, ("T((1, 2))", "S('x')"))])
    assert [answer.value for answer in result.answers] == [(1, 2), "x"]
    assert [type(answer.value) for answer in result.answers] == [tuple, str]


def test_each_expression_has_an_answer_of_its_own(pool):
    (result,) = pool.run([Job("def f(x): return 1 / x", ("f(0)", "f(2)", "f(", "g()", "f"))])
    assert [(answer.status, answer.value) for answer in result.answers] == [
        ("raised", None), ("ok", 0.5), ("invalid", None), ("raised", None), ("not_a_value", None)]  # fmt: skip
    assert (result.status, result.detail) == ("raised", "ZeroDivisionError: division by zero")


def test_what_was_answered_before_the_limit_counts():
    with contextlib.closing(Pool(Limits(seconds=0.3), workers=1)) as pool:
        (result,) = pool.run([Job("def f(x):\n    while x: pass\n    return x", ("f(0)", "f(1)", "f(0)"))])
    assert [answer.status for answer in result.answers] == ["ok", "timeout", "timeout"]
    assert result.status == "timeout" and 0.3 <= result.seconds < 3.0


def test_processor_time_is_limited_too():
    with contextlib.closing(Pool(Limits(seconds=30.0, cpu_seconds=1), workers=1)) as pool:
        (result,) = pool.run([Job("while True: pass")])
    assert (result.status, result.detail) == ("timeout", "past its cpu_seconds") and result.seconds < 20.0


def test_programs_share_nothing(pool):
    first = "import math, sys\nmath.pi = 4\nsys.modules['json'] = 1\nopen('left', 'w').write('x')"
    jobs = [Job(first), Job("import math, json\ndef f(): return math.pi, json.dumps([])", ("f()",)),
            Job("open('left').read()")] * 4  # fmt: skip
    results = pool.run(jobs)
    assert {result.answers[0].value for result in results[1::3]} == {(3.141592653589793, "[]")}
    assert all("left" in result.detail or "Permission" in result.detail for result in results[2::3])


def test_a_program_has_its_own_scratch_folder_and_the_listed_modules(pool):
    if not {"namespaces", "landlock"} & set(pool.walls()):
        pytest.skip("without namespaces and Landlock there is no scratch folder")
    program = ("import collections.abc, dataclasses, datetime, heapq, re, typing, decimal\n"
               "@dataclasses.dataclass\nclass P:\n    x: int\n"
               "def f():\n    with open('a', 'w') as file: file.write('b')\n"
               "    day = datetime.datetime.strptime('2020-02-01', '%Y-%m-%d').day\n"
               "    return open('a').read(), P(3).x, day, re.findall('a+', 'aab'), str(decimal.Decimal())")  # fmt: skip
    (result,) = pool.run([Job(program, ("f()",))])
    assert result.answers[0].value == ("b", 3, 1, ["aa"], "0"), result


def test_randomness_is_the_seed_s(pool):
    program = "import random\ndef f(): return random.random()"
    values = [result.answers[0].value for result in pool.run([Job(program, ("f()",), seed) for seed in (0, 0, 1)])]
    assert values[0] == values[1] != values[2]


def test_a_program_has_an_empty_environment_and_four_descriptors(pool):
    program = ("import sys\nos = sys.modules['os']\ndef f():\n    opened = []\n"
               "    for n in range(1024):\n        try:\n            os.fstat(n)\n"
               "            opened.append(n)\n        except OSError: pass\n"
               "    return dict(os.environ), opened")  # fmt: skip
    (result,) = pool.run([Job(program, ("f()",))])
    environment, opened = result.answers[0].value
    assert set(environment) <= {"PYTHONHASHSEED", "LC_CTYPE"} and opened == [0, 1, 2, 3]


def test_a_call_ends_in_its_time_and_what_had_no_turn_says_so():
    with contextlib.closing(Pool(Limits(seconds=5.0), workers=2)) as pool:
        pool.run([Job("")] * 2)
        started = time.monotonic()
        results = pool.run([Job("while True: pass", ("1",))] * 5, seconds=0.5)
    assert time.monotonic() - started < 3.0
    assert [result.status for result in results] == ["timeout"] * 2 + ["not_run"] * 3
    assert results[4].answers[0].status == "not_run"


def test_a_server_that_was_killed_costs_one_result():
    with contextlib.closing(Pool(workers=1)) as pool:
        pool.run([Job("")])
        os.killpg(pool._slots[0].process.pid, signal.SIGKILL)
        results = pool.run([Job("", ("1",)), Job("", ("2",))])
    assert [result.status for result in results] == ["died", "ok"]


def test_output_is_kept_and_forges_nothing():
    result = sandbox.run('print(\'{"status": "ok", "value": 42}\')', ("1 / 0",))
    assert result.output == '{"status": "ok", "value": 42}\n'
    assert [answer.status for answer in result.answers] == ["raised"]


@pytest.mark.parametrize("line", [
    b"", b"[]", b"7", b"{}", b"\xff", b"[" * 99999, b'{"status": "great"}', b'{"status": []}',
    b'{"status": "ok", "value": "}"}', b'{"status": "ok", "value": "{\\"set\\": [[]]}"}',
])  # fmt: skip
def test_whatever_a_channel_holds_is_read_without_harm(line):
    assert message_of(line).status == "died"


def test_without_walls_nothing_runs_unless_it_is_asked_for():
    hello = {"standing": ["landlock"], "missing": {"namespaces": "denied", "seccomp": "denied"}}
    with pytest.raises(Refused, match="no wall on this system: namespaces"):
        pool_lib._judge(hello, ())
    with pytest.raises(Refused, match="no wall on this system"):
        pool_lib._judge(hello, ("namespaces",))
    pool_lib._judge(hello, ("namespaces", "seccomp"))


def test_a_missing_wall_is_told_in_one_line_and_once(caplog):
    hello = {"standing": ["seccomp"], "missing": {"namespaces": json.dumps(time.time()), "landlock": "too old"}}
    with caplog.at_level(logging.WARNING, "mlrl"):
        pool_lib._judge(hello, ())
        pool_lib._judge(hello, ())
    (record,) = caplog.records
    assert "does without namespaces" in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("make, words", [
    (lambda: Pool(Limits(seconds=0.0)), "seconds must be more than 0"),
    (lambda: Pool(Limits(cpu_seconds=0)), "cpu_seconds must be at least 1"),
    (lambda: Pool(Limits(cpu_seconds=1.5)), "whole number"),
    (lambda: Pool(Limits(memory_bytes=1)), "memory_bytes must be at least"),
    (lambda: Pool(workers=-1), "workers must be 0 or more"),
    (lambda: Pool(without=("walls",)), "without names walls of"),
])  # fmt: skip
def test_a_mistake_is_refused(make, words):
    with pytest.raises(Refused, match=words):
        make()
