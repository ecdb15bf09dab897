"""A seccomp filter that allows what a Python program needs to compute, and denies everything else.

Denied are processes and threads, exec, sockets, signals to others, tracing, new executable memory, namespaces and
mounts, and, unless the file system is already confined, whatever opens or changes a file. A denied call fails with
EPERM, so that a program sees PermissionError. Numbers are those of the kernel's tables for x86-64 and arm64.
"""

import ctypes
import errno
import os
import platform
import struct

# name: (x86-64, arm64); -1 where there is none. Always allowed:
_COMPUTE = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "munmap": (11, 215),
    "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "readv": (19, 65),
    "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68), "futex": (202, 98), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "time": (201, -1), "times": (100, 153), "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "exit": (60, 93), "exit_group": (231, 94), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72), "dup": (32, 23),
    "dup2": (33, -1), "dup3": (292, 24), "getrusage": (98, 165), "sysinfo": (99, 179), "alarm": (37, -1),
    "setitimer": (38, 103), "getitimer": (36, 102), "restart_syscall": (219, 128),
}  # fmt: skip
# Allowed where the file system is a scratch folder and nothing else:
_FILES = {
    "open": (2, -1), "openat": (257, 56), "stat": (4, -1), "lstat": (6, -1), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, -1), "faccessat": (269, 48), "faccessat2": (439, 439), "mkdir": (83, -1),
    "mkdirat": (258, 34), "rmdir": (84, -1), "unlink": (87, -1), "unlinkat": (263, 35), "rename": (82, -1),
    "renameat": (264, 38), "renameat2": (316, 276), "getdents64": (217, 61), "readlink": (89, -1),
    "readlinkat": (267, 78), "chdir": (80, 49), "getcwd": (79, 17), "ftruncate": (77, 46),
    "fsync": (74, 82), "fdatasync": (75, 83),
}  # fmt: skip
_MMAP, _MPROTECT, _IOCTL, _FCNTL = (9, 222), (10, 226), (16, 29), (72, 25)
_KILL, _TGKILL, _PRLIMIT, _SECCOMP = (62, 129), (234, 131), (302, 261), (317, 277)

_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH
_ALLOW, _KILL_PROCESS, _DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PROT_EXEC = 4


def supported():
    """Raises OSError where the filter cannot be made: another architecture, or a kernel without seccomp."""
    if platform.machine() not in _ARCHES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    _call(2, 0, ctypes.byref(ctypes.c_uint32(_KILL_PROCESS)))  # SECCOMP_GET_ACTION_AVAIL


def program(*, files, pid):
    """The filter as classic BPF: `files` allows opening files, `pid` is the only process that may be signalled."""
    column, arch = _ARCHES[platform.machine()]
    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, _NUMBER)]
    if column == 0:  # the x32 calls of x86-64
        steps += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL_PROCESS)]
    for numbers in [*_COMPUTE.values(), *(_FILES.values() if files else ())]:
        if numbers[column] >= 0:
            steps += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ALLOW)]

    def given(numbers, argument, tests):
        """Allows the call if a test of the low half of an argument passes."""
        body = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
        for code, value, wanted in tests:
            body += [(code, 0, 1, value) if wanted else (code, 1, 0, value), (_RETURN, 0, 0, _ALLOW)]
        body += [(_RETURN, 0, 0, _DENY)]
        return [(_EQUAL, 0, len(body), numbers[column]), *body]

    steps += given(_MMAP, 2, [(_BITS, _PROT_EXEC, False)]) + given(_MPROTECT, 2, [(_BITS, _PROT_EXEC, False)])
    terminals, descriptors = (0x5401, 0x5413, 0x5451), (0, 1, 2, 3, 1030)  # isatty, size, cloexec; dup, flags
    steps += given(_IOCTL, 1, [(_EQUAL, request, True) for request in terminals])
    steps += given(_FCNTL, 1, [(_EQUAL, command, True) for command in descriptors])
    steps += given(_KILL, 0, [(_EQUAL, pid, True)]) + given(_TGKILL, 0, [(_EQUAL, pid, True)])
    steps += given(_PRLIMIT, 0, [(_EQUAL, 0, True)])  # limits of itself: they can only be lowered
    steps += [(_RETURN, 0, 0, _DENY)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def install(*, files):
    """Puts this process, which must have PR_SET_NO_NEW_PRIVS, behind the filter for good."""
    code = program(files=files, pid=os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    _call(1, 0, ctypes.byref(Program(len(code) // 8, ctypes.addressof(buffer))))  # SECCOMP_SET_MODE_FILTER


def _call(*arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SECCOMP[_ARCHES[platform.machine()][0]], *arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
