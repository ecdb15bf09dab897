"""What the kernel puts around a program: namespaces, Landlock, dropped privileges, limits, and a seccomp filter.

The server calls `around_server` once, and a forked child `around_program` just before it runs the program. Each wall
stands alone: where a kernel or a container refuses one, the others stay, and the server reports which are missing.
"""

import contextlib
import ctypes
import os
import resource
import sys

from . import seccomp

WALLS = ("namespaces", "landlock", "seccomp")
NOBODY = 65534
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _NOEXEC, _REC, _PRIVATE, _DETACH = 2, 4, 8, 0x4000, 0x40000, 2
_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_RULESET, _ADD_RULE, _RESTRICT = 444, 445, 446  # Landlock's numbers are the same everywhere
# Landlock's rights: write and read files, list, remove and make folders and plain files, truncate.
_SCRATCH_RIGHTS = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 14))
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    number = getattr(_libc, name)(*arguments)
    if number == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return number


def _prctl(option, value=0):
    _call("prctl", option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0)))


def _mount(source, target, kind, flags, data=b""):
    _call("mount", source, target, kind, ctypes.c_ulong(flags), data or None)


def _into(folder):
    """Makes the mounted `folder` the root of this mount namespace, and lets go of everything else."""
    os.chdir(folder)
    _call("syscall", _PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/")


class Server:
    """The walls around the server, and so around all of its programs.

    standing  the walls that stand, by name
    missing   {name: why} of those that this kernel, this container or this user does not get
    """

    def __init__(self, folder, without=()):
        self.standing, self.missing, self._folder, self._pid_namespace = set(), {}, folder, -1
        for name, test in (("seccomp", seccomp.supported), ("landlock", _landlock_version)):
            self._note(name, test, without)
        self.root = os.geteuid() == 0
        self.size_bytes = _address_space_bytes()
        self._note("namespaces", lambda: _try_namespaces(folder), without)

    def _note(self, name, test, without):
        try:
            if name in without:
                raise OSError(0, "switched off")
            if not sys.platform.startswith("linux"):
                raise OSError(0, f"{sys.platform} has none")
            test()
            self.standing.add(name)
        except (OSError, AttributeError, KeyError) as error:
            self.missing[name] = getattr(error, "strerror", None) or str(error)

    def enter(self):
        """Puts the server, and with it every program, into namespaces; it goes on as process 1 of its own, while the
        process that called only waits for it.
        """
        if sys.platform.startswith("linux"):
            _prctl(_SUBREAPER, 1)
        if "namespaces" not in self.standing:
            return
        _unshare(_NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWPID)
        inner = os.fork()
        if inner:
            os.closerange(0, 1024)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
        _prctl(_PDEATHSIG, 9)
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        _empty_root(self._folder)

    def fork(self):
        """os.fork, where the child is process 1 of a new PID namespace if there are namespaces."""
        if self._pid_namespace >= 0:
            _call("setns", self._pid_namespace, _NEWPID)
            _call("unshare", _NEWPID)
        return os.fork()

    def around_program(self, limits, scratch):
        """In the child: everything, from the descriptors that stay open to the filter. Nothing is allowed afterwards
        but to compute, to write to descriptors 1 to 3, and to use the scratch folder if there is one.
        """
        confined = False
        if "namespaces" in self.standing:
            _call("unshare", _NEWNS)
            size = f"size={limits['file_bytes']},nr_inodes=256,mode=0777".encode()
            _mount(b"tmpfs", b"/box", b"tmpfs", _NOSUID | _NODEV | _NOEXEC, size)
            _into("/box")
            scratch, confined = "/", True
        elif scratch:
            os.chdir(scratch)
            scratch = "."
        _limit(limits, self.size_bytes)
        _drop_privileges(self.root)
        if not sys.platform.startswith("linux"):
            return
        _prctl(_NO_NEW_PRIVS, 1)
        _prctl(_DUMPABLE, 0)  # no other process of this user may look into it
        _prctl(_PDEATHSIG, 9)
        if "landlock" in self.standing:
            _landlock(scratch)
            confined = True
        if "seccomp" in self.standing:
            seccomp.install(files=confined)


def _empty_root(folder):
    """Leaves a file system that holds one empty folder, /box, to mount a program's scratch on."""
    _mount(None, b"/", None, _REC | _PRIVATE)
    _mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NOSUID | _NODEV | _NOEXEC, b"size=64k,mode=0755")
    os.mkdir(os.path.join(folder, "box"))
    _into(folder)


def _unshare(flags):
    """Unshares as root may, or else from within a new user namespace."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            _call("unshare", flags)
            return
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", flags | _NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _try_namespaces(folder):
    """Raises OSError unless a child gets the namespaces and may mount in them (some systems give them powerless)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _unshare(_NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWPID)
            _empty_root(folder)
        except (OSError, KeyError) as error:
            os.write(writer, str(getattr(error, "strerror", None) or error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    why = os.read(reader, 500).decode()
    os.close(reader)
    os.waitpid(child, 0)
    if why:
        raise OSError(0, why)


def _address_space_bytes():
    """What the interpreter itself has mapped: a program's limit comes on top. 64 MiB where nobody says."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 64 << 20


def _limit(limits, size_bytes):
    wanted = {
        "RLIMIT_CORE": 0, "RLIMIT_CPU": limits["cpu_seconds"], "RLIMIT_FSIZE": limits["file_bytes"],
        "RLIMIT_NOFILE": limits["open_files"], "RLIMIT_AS": size_bytes + limits["memory_bytes"], "RLIMIT_NPROC": 0,
        "RLIMIT_MSGQUEUE": 0, "RLIMIT_MEMLOCK": 0,
    }  # fmt: skip
    for name, value in wanted.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not on this system, or lower already
            resource.setrlimit(getattr(resource, name), (value, value))


def _drop_privileges(root):
    if root:
        with contextlib.suppress(OSError):  # a container without these rights: its root has little to drop
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if sys.platform.startswith("linux"):
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        _call("capset", header, (ctypes.c_uint32 * 6)())


def _landlock_version():
    return _call("syscall", _RULESET, None, ctypes.c_size_t(0), 1)


def _landlock(scratch):
    """Denies every use of the file system but plain files and folders beneath `scratch`, TCP, and signals out."""
    version = _landlock_version()
    rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15 if version >= 5 else 0)
    attributes = (ctypes.c_uint64 * 3)(rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _call("syscall", _RULESET, attributes, ctypes.c_size_t(size), 0)
    if scratch:
        folder = os.open(scratch, os.O_PATH)
        rule = (rights & _SCRATCH_RIGHTS).to_bytes(8, sys.byteorder) + folder.to_bytes(4, sys.byteorder)
        _call("syscall", _ADD_RULE, rules, 1, rule, 0)
        os.close(folder)
    _call("syscall", _RESTRICT, rules, 0)
    os.close(rules)
