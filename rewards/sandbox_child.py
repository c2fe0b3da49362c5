"""What runs inside the sandbox's process: it gives up rights for good, layer by layer, then runs the program.

Executed as a script by `sandbox.py` (`python -I -S -B sandbox_child.py <settings as JSON>`), so it uses the standard
library only. Everything here happens before the first line of the untrusted program; afterwards the kernel holds the
limits, and nothing that the program does to this interpreter lifts them.

Sources: seccomp(2), landlock(7), capabilities(7), prctl(2) of the Linux manual; system call numbers from the kernel's
`unistd_64.h` (x86-64) and `asm-generic/unistd.h` (aarch64).
"""

import ctypes
import errno
import json
import os
import platform
import resource
import runpy
import struct
import sys
from collections.abc import Callable
from typing import Any

PROGRAM = "main.py"
LAYERS = ("rlimits", "seccomp", "landlock")

# Denied with EPERM, as "name x86-64 aarch64" ("-": the architecture has no such call).
_DENIED = """
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281,
io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
process_mrelease 448 448, kcmp 312 272,
setrlimit 160 164, setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239,
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
name_to_handle_at 303 264, open_by_handle_at 304 265, memfd_create 319 279, memfd_secret 447 447,
shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197,
msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187,
semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192,
mq_open 240 180, mq_unlink 241 181, mq_notify 244 184, mq_timedsend 242 182, mq_timedreceive 243 183,
unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
mount_setattr 442 442,
bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, keyctl 250 219, add_key 248 217, request_key 249 218,
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294,
reboot 169 142, swapon 167 224, swapoff 168 225, personality 135 92, acct 163 89, quotactl 179 60,
quotactl_fd 443 443, syslog 103 116, settimeofday 164 170, clock_settime 227 112, adjtimex 159 171,
clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, vhangup 153 58,
iopl 172 -, ioperm 173 -, modify_ldt 154 -, fanotify_init 300 262, fanotify_mark 301 263,
inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27
"""
# Allowed or denied by their arguments.
_CONDITIONAL = {
    "x86_64": {"kill": 62, "tgkill": 234, "clone": 56, "prlimit64": 302, "fcntl": 72, "ioctl": 16, "socketpair": 53},
    "aarch64": {
        "kill": 129,
        "tgkill": 131,
        "clone": 220,
        "prlimit64": 261,
        "fcntl": 25,
        "ioctl": 29,
        "socketpair": 199,
    },
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE3, _FIRST_UNKNOWN = 435, 463  # calls newer than this table, and the x32 ones (bit 30), do not exist in here

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(name: str, *arguments: Any) -> int:
    """Call a function of the C library with machine words or pointers; OSError where it returns -1."""
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(_libc, name)(*words)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")
    return int(result)


def drop_privileges() -> None:
    """No capabilities (they matter to root only), no way to gain any, and death with the parent."""
    _checked("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _checked("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked("capset", header, bytes(24))


def apply_rlimits(settings: dict[str, Any]) -> None:
    """Soft limits equal hard ones, except CPU: SIGXCPU at the limit, SIGKILL a second later if it is ignored."""
    cpu = settings["cpu_seconds"]
    _lower(resource.RLIMIT_CPU, cpu, cpu + 1)
    _lower(resource.RLIMIT_AS, settings["memory_bytes"])
    _lower(resource.RLIMIT_FSIZE, settings["file_bytes"])
    _lower(resource.RLIMIT_NOFILE, settings["open_files"])
    _lower(resource.RLIMIT_CORE, 0)


def _lower(which: int, soft: int, hard: int | None = None) -> None:
    """Never above the limit that already holds, which an unprivileged process may not raise."""
    hard = soft if hard is None else hard
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def apply_seccomp(settings: dict[str, Any]) -> None:
    """Install the filter of `seccomp_filter`; OSError where the kernel or the architecture has none."""
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"the seccomp filter is written for x86_64 and aarch64, this machine is {machine}")
    code = seccomp_filter(machine, os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _checked("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def seccomp_filter(machine: str, pid: int) -> bytes:
    """A classic BPF program (8 bytes an instruction) over the system call's number and arguments."""
    load, equal, at_least, any_bit, mask, leave = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    code: list[bytes] = []

    def emit(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append(struct.pack("<HBBI", operation, if_true, if_false, value))

    def rule(call: int, steps: list[tuple[int, ...]]) -> None:
        emit(equal, call, 0, len(steps))
        for step in steps:
            emit(*step)

    def argument(index: int) -> tuple[int, int]:
        return load, 16 + 8 * index  # its low word: both architectures are little-endian

    emit(load, 4)
    emit(equal, _AUDIT_ARCH[machine], 1, 0)
    emit(leave, kill)
    emit(load, 0)
    rule(_CLONE3, [(leave, missing)])  # its flags lie in memory, out of a filter's sight: libc falls back to clone
    emit(at_least, _FIRST_UNKNOWN, 0, 1)
    emit(leave, missing)
    column = 1 if machine == "x86_64" else 2
    for entry in _DENIED.split(","):
        number = entry.split()[column]
        if number != "-":
            rule(int(number), [(leave, deny)])
    calls = _CONDITIONAL[machine]
    for name in ("kill", "tgkill"):  # only to itself
        rule(calls[name], [argument(0), (equal, pid, 0, 1), (leave, allow), (leave, deny)])
    rule(calls["clone"], [argument(0), (any_bit, 0x10000, 0, 1), (leave, allow), (leave, deny)])  # CLONE_THREAD
    high_word = (load, 16 + 8 * 2 + 4)
    reads_only = [argument(2), (equal, 0, 0, 3), high_word, (equal, 0, 0, 1), (leave, allow), (leave, deny)]
    rule(calls["prlimit64"], reads_only)
    # A descriptor's owner gets signals when it becomes ready: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP.
    rule(calls["fcntl"], [argument(1), (equal, 8, 2), (equal, 10, 1), (equal, 15, 0, 1), (leave, deny), (leave, allow)])
    terminal = [(equal, 0x5412, 1), (equal, 0x541C, 0, 1)]  # TIOCSTI, TIOCLINUX: typing into the parent's terminal
    owner = [(equal, 0x8901, 3), (equal, 0x8902, 2)]
    rule(calls["ioctl"], [argument(1), *owner, *terminal, (leave, deny), (leave, allow)])
    # A connected stream pair reaches nobody else (asyncio needs it); a datagram one could send to any unix socket.
    stream = [argument(1), (mask, 0xF), (equal, 1, 0, 1), (leave, allow), (leave, deny)]
    rule(calls["socketpair"], stream)
    emit(leave, allow)
    return b"".join(code)


def apply_landlock(settings: dict[str, Any]) -> None:
    """Files: the working directory, the libraries for reading, nothing else. OSError where there is no Landlock."""
    version = _checked("syscall", 444, 0, 0, 1)  # landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
    everything = (1 << 13) - 1  # execute, write, read, list, remove, make ...
    for since, bit in ((2, 13), (3, 14), (5, 15)):  # REFER, TRUNCATE, IOCTL_DEV
        if version >= since:
            everything |= 1 << bit
    network = 3 if version >= 4 else 0  # TCP bind and connect
    scope = 3 if version >= 6 else 0  # abstract unix sockets and signals to processes outside
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _checked("syscall", 444, struct.pack("<QQQ", everything, network, scope)[:size], size, 0)
    execute, write, read, read_directory = 1, 2, 4, 8
    _landlock_allow(ruleset, ".", everything & ~execute)
    for path in settings["readable"]:
        if os.path.exists(path):
            _landlock_allow(ruleset, path, read | read_directory if os.path.isdir(path) else read)
    _landlock_allow(ruleset, "/dev/null", read | write)
    _checked("syscall", 446, ruleset, 0)
    os.close(ruleset)


def _landlock_allow(ruleset: int, path: str, access: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _checked("syscall", 445, ruleset, 1, struct.pack("<Qi", access, handle), 0)  # LANDLOCK_RULE_PATH_BENEATH
    finally:
        os.close(handle)


_APPLY: dict[str, Callable[[dict[str, Any]], None]] = {
    "rlimits": apply_rlimits,
    "landlock": apply_landlock,
    "seccomp": apply_seccomp,  # last: the other layers' system calls need not be allowed by it
}


def probe(settings: dict[str, Any]) -> dict[str, str]:
    """Apply every layer in turn; per layer "" or why the kernel refused it."""
    reasons = {}
    for name, apply in _APPLY.items():
        try:
            apply(settings)
            reasons[name] = ""
        except (OSError, ValueError) as error:
            reasons[name] = str(error)
    return reasons


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ.clear()  # Python itself sets LC_CTYPE at its start
    drop_privileges()
    if settings["probe"]:
        print(json.dumps(probe(settings)))
        return
    for name, apply in _APPLY.items():
        if name in settings["layers"]:
            apply(settings)
    sys.argv[:] = [PROGRAM, *settings["arguments"]]
    os.write(settings["ready"], b"1")
    os.close(settings["ready"])
    runpy.run_path(PROGRAM, run_name=settings["run_name"])


if __name__ == "__main__":
    main()
