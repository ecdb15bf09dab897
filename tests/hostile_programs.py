"""Programs that mean harm, by name: (program, statuses allowed behind the kernel's walls, and with the guard alone).

SECRET, TARGET and PORT are replaced by a file that holds a secret, a path that must not come to exist, and a port that
listens. `f()` is evaluated after the program. What a program gets at must show in no value and in no output.
"""

# Two ways to the real `os` past the guard: behind the walls both work, and must be of no use.
OS = "import sys\nos = sys.modules['os']\n"
SUBCLASSES = """
def reach():
    for cls in ().__class__.__base__.__subclasses__():
        if cls.__name__ == '_wrap_close':
            return cls.__init__.__globals__
os = type('M', (), reach())
"""
RAISED, REFUSED, DIED = {"raised"}, {"raised", "refused"}, {"died"}

ENDLESS = {
    "loop": ("while True: pass", {"timeout"}, {"timeout"}),
    "loop that catches all": (
        "def f():\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        {"timeout"}, {"timeout"}),
    "sleep": ("import time\ntime.sleep(1000)", {"timeout"}, RAISED),
    "regular expression": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", {"timeout"}, {"timeout"}),
    "power": ("x = 7 ** (10 ** 9)", {"timeout", "memory"}, {"timeout", "memory"}),
    "endless output": ("while True: print('x' * 10000)", {"output"}, {"output"}),
    "output of one piece": ("print('x' * (5 << 20))", {"output"}, {"output"}),
    "endless value": ("def f(): return 'x' * 200000", {"output"}, {"output"}),
    "handlers": (OS + "import sys\nsignal = sys.modules['signal']\nfor n in range(1, 65):\n    try:\n        "
                 "signal.signal(n, lambda *a: None)\n    except Exception: pass\nwhile True: pass",
                 {"timeout"}, RAISED),
    "closes its channel and goes on": (
        OS + "for n in range(64):\n    try: os.close(n)\n    except OSError: pass\nwhile True: pass", DIED, RAISED),
    "stops itself": (OS + "os.kill(os.getpid(), 19)\nwhile True: pass", {"timeout"}, RAISED),
}  # fmt: skip

MEMORY = {
    "list": ("x = []\nwhile True: x.append(x[:] + [0] * 10 ** 6)", {"memory"}, {"memory"}),
    "bytes": ("x = bytearray(10 ** 10)", {"memory"}, {"memory"}),
    "integer": ("x = 1 << (8 * 10 ** 9)", {"memory"}, {"memory"}),
    "recursion": ("def f(): return f()", RAISED, RAISED),
    "recursion in C": ("import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6): x = [x]\n"
                       "def f(): return repr(x)", {"died", "memory", "raised", "timeout"}, RAISED),
    "deep value": ("x = []\nfor _ in range(1000): x = [x]\ndef f(): return x", {"not_a_value"}, {"not_a_value"}),
    "huge integer printed": ("print(10 ** 100000)", RAISED, RAISED),
    "huge integer returned": ("def f(): return 10 ** 100000", {"not_a_value"}, {"not_a_value"}),
    "nested source": ("x = " + "(" * 5000 + ")" * 5000, {"invalid", "memory"}, {"invalid", "memory", "died"}),
    "long source": ("x = " + "-" * 100000 + "1", {"invalid", "memory", "died", "raised", "ok"},
                    {"invalid", "memory", "died"}),
    "null byte": ("x = 1\0", {"invalid"}, {"invalid"}),
}  # fmt: skip

PROCESSES = {
    "fork bomb": (OS + "while True: os.fork()", RAISED, RAISED),
    "fork": (SUBCLASSES + "def f(): return os.fork()", RAISED, REFUSED),
    "spawn": (OS + "os.posix_spawn('/bin/sh', ['sh', '-c', 'sleep 77'], {})", RAISED, RAISED),
    "exec": (OS + "os.execv('/bin/sh', ['sh', '-c', 'sleep 77'])", RAISED, RAISED),
    "system": (SUBCLASSES + "def f():\n    assert os.system('touch TARGET') == 0", RAISED, REFUSED),
    "daemon": (OS + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
               RAISED, RAISED),
    "thread": ("import sys\nthread = sys.modules['_thread']\ndef f():\n    thread.start_new_thread(print, ())", RAISED,
               RAISED),
    "signals the parent": (OS + "def f():\n    os.kill(os.getppid(), 9)", RAISED | DIED, RAISED),
    "signals everybody": (OS + "def f():\n    os.kill(-1, 9)", RAISED, RAISED),
    "signals its group": (OS + "def f():\n    os.kill(0, 9)", RAISED, RAISED),
    "signals process 1": (OS + "def f():\n    if os.getpid() == 1: raise PermissionError\n    os.kill(1, 9)",
                          RAISED, RAISED),
    "traces": ("import sys\nctypes = sys.modules['ctypes']\ndef f():\n    libc = ctypes.CDLL(None, use_errno=True)\n"
               "    assert libc.ptrace(16, 1, 0, 0) != -1", RAISED, RAISED),
    "own machine code": (
        "import sys\nctypes = sys.modules['ctypes']\ndef f():\n    libc = ctypes.CDLL(None)\n"
        "    libc.mmap.restype = ctypes.c_long\n    assert libc.mmap(0, 4096, 7, 34, -1, 0) != -1", RAISED, RAISED),
    "calls address 0": ("import sys\nctypes = sys.modules['ctypes']\nctypes.string_at(0)", DIED, RAISED),
    "mounts": ("import sys\nctypes = sys.modules['ctypes']\ndef f():\n    libc = ctypes.CDLL(None)\n"
               "    assert 0 == libc.mount(b'proc', b'/', b'proc', 0, None) or 0 == libc.unshare(0x10000000)\n", RAISED,
               RAISED),
    "regains root": (OS + "def f():\n    os.setuid(0)", RAISED, RAISED),
    "raises its limits": ("import sys\nresource = sys.modules['resource']\n"
                          "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", RAISED, RAISED),
}  # fmt: skip

FILES = {
    "reads passwd": ("def f(): return open('/etc/passwd').read()", RAISED, RAISED),
    "reads the secret": ("def f(): return open('SECRET').read()", RAISED, RAISED),
    "reads the secret by os": (SUBCLASSES + "def f(): return os.read(os.open('SECRET', 0), 99)", RAISED, REFUSED),
    "reads its own source": ("def f(): return open('mlrl/sandbox/inside.py').read()", RAISED, RAISED),
    "reads a home": (OS + "def f(): return os.listdir(os.path.expanduser('~root'))", RAISED, RAISED),
    "reads an environment": (OS + "def f(): return open('/proc/%d/environ' % os.getppid()).read()", RAISED, RAISED),
    "lists": (OS + "def f():\n    if set(os.listdir('/')) <= set(): raise PermissionError", RAISED, RAISED),
    "climbs": ("def f(): return open('../' * 30 + 'SECRET').read()", RAISED, RAISED),
    "symlink": (OS + "def f():\n    os.symlink('/etc/passwd', 'link')\n    return open('link').read()", RAISED,
                RAISED),
    "writes outside": ("def f(): open('TARGET', 'w').write('x')", RAISED, RAISED),
    "writes over the secret": ("def f(): open('SECRET', 'a').write('x')", RAISED, RAISED),
    "removes the secret": (OS + "def f(): os.unlink('SECRET')", RAISED, RAISED),
    "chmods the secret": (OS + "def f(): os.chmod('SECRET', 0o777)", RAISED, RAISED),
    "device": (OS + "def f(): os.mknod('null', 0o20666, 259)", RAISED, RAISED),
    "chroot": (OS + "def f(): os.chroot('.')", RAISED, RAISED),
    "fills the disk": ("def f():\n    for n in range(10 ** 6):\n        with open(str(n), 'w') as file:\n"
                       "            file.write('x' * (3 << 20))", RAISED, RAISED),
    "many descriptors": ("def f(): return [open(str(n), 'w') for n in range(1000)]", RAISED, RAISED),
}  # fmt: skip

NETWORK = {
    "socket": ("import sys\nsys.modules['_socket']", RAISED, RAISED),
    "connects": ("import sys\nctypes = sys.modules['ctypes']\ndef f():\n    libc = ctypes.CDLL(None)\n"
                 "    for family in (1, 2, 10, 16, 17):\n        for kind in (1, 2, 3):\n"
                 "            if libc.socket(family, kind, 0) != -1: return 'a socket'\n    raise PermissionError",
                 RAISED, RAISED),
    "input": ("def f(): return input()", RAISED, RAISED),
    "reads descriptor 0": (OS + "def f():\n    if os.read(0, 10) == b'': raise EOFError", RAISED, RAISED),
}  # fmt: skip

PYTHON = {
    **{f"import {name}": (f"import {name}", RAISED, RAISED) for name in (
        "os", "ctypes", "subprocess", "socket", "signal", "shutil", "pathlib", "importlib", "posix", "multiprocessing",
        "threading", "builtins", "gc", "inspect", "site", "mlrl", "sandbox", "numpy", "os.path")},
    "import by name": ("__import__('os').system('touch TARGET')", RAISED, REFUSED),
    "exits": ("import sys\nsys.exit(0)", RAISED, RAISED),
    "exits by os": (OS + "os._exit(0)", DIED, REFUSED),
    "raises BaseException": ("def f(): raise BaseException('x')", RAISED, RAISED),
    "raises KeyboardInterrupt": ("raise KeyboardInterrupt", RAISED, RAISED),
    "an exception that cannot be shown": (
        "class E(Exception):\n    def __str__(self): raise BaseException\nraise E", RAISED, RAISED),
    "deletes builtins": ("__builtins__.clear()\ndef f(): return 1", {"ok"}, REFUSED),
    "deletes all builtins": ("import sys\nvars(sys.modules['builtins']).clear()\ndef f(): return 1",
                             {"ok", "raised", "died"}, REFUSED),
    "prints a result": ("print('{\"status\": \"ok\", \"value\": 42}')\ndef f(): return 1 / 0", RAISED, RAISED),
    "writes rubbish into the channel": (OS + "def f(): os.write(3, b'[[[[\\n' * 9)", DIED, RAISED),
    "writes depth into the channel": (
        OS + "def f(): os.write(3, b'{\"status\": \"ok\", \"value\": \"' + b'[' * 9999 + b'\"}\\n')",
        DIED | RAISED, RAISED),
    "format string": ("def f(): return '{0.__class__.__base__}'.format(1).__class__.__subclasses__", {"not_a_value"},
                      REFUSED),
    "frames": ("import sys\ndef f(): return sys._getframe().f_back.f_globals['os'].system('touch TARGET') or 1 / 0",
               RAISED, REFUSED),
    "generator frames": ("g = (g.gi_frame.f_back.f_back.f_globals for _ in [1])\ndef f(): return list(g)[0]['x']",
                         RAISED, REFUSED),
    "a value that lies": ("class T(tuple):\n    def __iter__(self): return iter(['forged'])\n    def __eq__(self, o): "
                          "return True\ndef f(): return T((1, 2))", {"ok"}, {"ok"}),
    "a class of its own": ("class A: pass\ndef f(): return A()", {"not_a_value"}, {"not_a_value"}),
    "not Python": ("def f(:", {"invalid"}, {"invalid"}),
}  # fmt: skip
QUICK = MEMORY | PROCESSES | FILES | NETWORK | PYTHON
# Behind namespaces alone these calls go through, where there is nothing: an empty network, no other process.
UNFILTERED = {"signals the parent", "signals its group", "own machine code", "mounts", "connects"}
