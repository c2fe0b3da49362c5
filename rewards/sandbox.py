"""Runs Python programs that nobody has read: those that a policy writes.

    result = run_python("print(int(input()) ** 2)", stdin="7")
    result.stdout, result.status, result.limit          # "49\n", 0, None

Each program runs in a fresh process (`python -I -S -B`: the standard library only, no site-packages) of its own
session, in a new empty directory, with an empty environment and no inherited descriptors. The layers, each checked
once by applying it (`layers()`):

- `rlimits`: CPU seconds, address space, size of a file, open files, no core dumps.
- `seccomp`: a filter on system calls. No sockets, no new processes or programs (threads are allowed), no signals to
  others, no tracing, no namespaces or mounts, no changes of modes, owners or times of files, no raised limits. The
  denied calls fail with EPERM; calls newer than the filter with ENOSYS. x86-64 and aarch64.
- `landlock` (Linux 5.13): its own directory, the standard library and the shared libraries of the system (both for
  reading) are all it can open. Links out of the directory are followed and then refused.

Always, without a layer: capabilities are dropped (being root helps little), new ones cannot be gained, wall-clock
time is limited, output is cut off, and the process group is killed at the end and the directory removed.

What it does not protect against: faults in the kernel, side channels, and use of what is allowed: CPU and memory
bandwidth that others want, as many files of the largest size as fit into the time, and metadata (Landlock lets
a program ask whether a path exists, its size and its owner, and whatever is under the library folders can be read).
RLIMIT_AS bounds the address space of the one process. Without `seccomp` there is no network or signal isolation, a
program may fork, and a process that leaves the group outlives the run; without `landlock` it reads and writes
whatever your user may. Who needs more puts the training into a container or a virtual machine.

Linux only. Run from several threads at a time if you like; nothing here uses signals or `preexec_fn`.
"""

import errno
import functools
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from . import sandbox_child
from .sandbox_child import LAYERS, PROGRAM

logger = logging.getLogger(__name__)


class SandboxError(RuntimeError):
    """The sandbox cannot be set up: a required layer is missing, or the process failed before the program began."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: wall-clock time, the interpreter's start (some 50 ms) included.
        cpu_seconds: of all its threads together, in whole seconds.
        memory_bytes: of address space; the interpreter alone takes about 50 MiB, each thread 8 MiB.
        file_bytes: the largest file it may write.
        output_bytes: of standard output, and of standard error; a program that prints more is killed.
        open_files: descriptors open at a time.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 16 * 2**20
    output_bytes: int = 256 * 2**10
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"Limits({name}={value}): must be above 0")


@dataclass(frozen=True)
class Result:
    """What became of a program.

    Args:
        status: its exit status; minus the signal's number where a signal ended it.
        stdout: at most `output_bytes` of it, decoded as UTF-8 with replacement characters.
        stderr: the same of standard error.
        seconds: wall-clock time.
        limit: "time", "cpu", "memory", "file_size" or "output" where it ran into that limit, else None. Memory and file
            size are told by Python's own error message, so a program that catches the error hides them.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    limit: str | None


@functools.cache
def layers() -> dict[str, str]:
    """The layers of this machine: "" where one works, else why not. Found by applying them to a process, once."""
    if sys.platform != "linux":
        return dict.fromkeys(LAYERS, f"the sandbox needs Linux, this is {sys.platform}")
    command = _command({**_settings(Limits()), "probe": True})
    with _directory() as directory:
        probe = subprocess.run(command, cwd=directory, env={}, capture_output=True, text=True, timeout=60)
    if probe.returncode:
        raise SandboxError(f"the sandbox's process fails on this machine:\n{probe.stderr}")
    return dict(json.loads(probe.stdout))


def run_python(
    source: str,
    stdin: str = "",
    arguments: Sequence[str] = (),
    limits: Limits | None = None,
    require: Sequence[str] = LAYERS,
    run_name: str = "__main__",
) -> Result:
    """Run the program `source` and wait for it.

    Args:
        stdin: what it reads from standard input.
        arguments: `sys.argv[1:]`.
        limits: by default `Limits()`.
        require: the layers without which nothing is run; the others are used where they work.
        run_name: `__name__` of the program; another than "__main__" leaves out what it guards with that.

    Raises:
        SandboxError: a required layer is missing here, or the process failed before the program began.
    """
    active = _active_layers(tuple(require))
    limits = limits or Limits()
    settings = _settings(limits) | {"layers": active, "arguments": list(arguments), "run_name": run_name}
    ready_read, ready_write = os.pipe()
    try:
        with _directory() as directory, tempfile.TemporaryFile() as stdin_file:
            with open(os.path.join(directory, PROGRAM), "wb") as file:
                file.write(source.encode("utf-8", "surrogatepass"))
            stdin_file.write(stdin.encode("utf-8", "surrogatepass"))
            stdin_file.seek(0)
            process = subprocess.Popen(
                _command(settings | {"ready": ready_write}),
                stdin=stdin_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
                env={},
                pass_fds=[ready_write],
                start_new_session=True,
            )
            result = _watch(process, limits)
        os.close(ready_write)
        ready_write = -1
        began = os.read(ready_read, 1)
    finally:
        os.close(ready_read)
        if ready_write >= 0:
            os.close(ready_write)
    if not began and result.limit != "time":
        raise SandboxError(f"the sandbox's process failed before the program began:\n{result.stderr}")
    return result


@functools.cache
def _active_layers(require: tuple[str, ...]) -> list[str]:
    if unknown := set(require) - set(LAYERS):
        raise ValueError(f"require={list(require)}: no such layer as {sorted(unknown)}, there are {list(LAYERS)}")
    found = layers()
    missing = {name: reason for name, reason in found.items() if reason}
    if needed := {name: reason for name, reason in missing.items() if name in require}:
        remaining = [name for name in require if name not in needed]
        raise SandboxError(
            f"this machine lacks layers of the sandbox: {needed}. Run where the kernel has them (containers may filter "
            f"them out), or accept programs that are contained less: require={remaining}"
        )
    if missing:
        logger.warning("programs run without these layers of the sandbox: %s", missing)
    return [name for name in LAYERS if name not in missing]


def _command(settings: dict[str, Any]) -> list[str]:
    child = os.path.abspath(sandbox_child.__file__)
    return [sys.executable, "-I", "-S", "-B", "-X", "utf8", child, json.dumps(settings)]


def _settings(limits: Limits) -> dict[str, Any]:
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    return {**vars(limits), "readable": [*libraries, *system, "/dev/urandom"], "probe": False}


@contextmanager
def _directory() -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield directory
    finally:
        try:
            shutil.rmtree(directory, ignore_errors=True)
        except RecursionError:
            logger.debug("a program nested its directories too deep for shutil.rmtree")
        if os.path.exists(directory):
            # What a program has made unreadable is ours all the same, but only root gets past the mode.
            subprocess.run(["chmod", "-R", "u+rwx", "--", directory], capture_output=True)
            removal = subprocess.run(["rm", "-rf", "--", directory], capture_output=True, text=True)
            if removal.returncode:  # by a process that left the group: no reason to end whoever runs programs
                logger.warning("a program's directory stays behind: %s", removal.stderr.strip())


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> Result:
    """Read both streams until the process is gone, out of time or too talkative; then kill what is left of it."""
    assert process.stdout is not None and process.stderr is not None
    start = time.monotonic()
    streams: dict[int, bytearray] = {}
    limit = None
    with process.stdout as stdout, process.stderr as stderr, selectors.DefaultSelector() as selector:
        exited = os.pidfd_open(process.pid)
        try:
            selector.register(exited, selectors.EVENT_READ)
            for stream in (stdout, stderr):
                os.set_blocking(stream.fileno(), False)
                streams[stream.fileno()] = bytearray()
                selector.register(stream, selectors.EVENT_READ)
            running = True
            while running and limit is None:
                ready = selector.select(max(0.0, start + limits.seconds - time.monotonic()))
                running = all(key.fd != exited for key, _ in ready)
                for key, _ in ready:
                    if key.fd != exited and not _read(key.fd, streams[key.fd], limits.output_bytes):
                        selector.unregister(key.fileobj)
                limit = _passed(streams, limits, start, running)
        finally:
            _kill_group(process)
            os.close(exited)
        seconds = time.monotonic() - start
        if limit is None:
            limit = _drain((stdout, stderr), streams, limits)
        texts = [
            streams[stream.fileno()][: limits.output_bytes].decode("utf-8", "replace") for stream in (stdout, stderr)
        ]
    limit = limit or _limit_by_ending(process.returncode, seconds, texts[1], limits)
    return Result(process.returncode, texts[0], texts[1], seconds, limit)


def _read(stream: int, into: bytearray, most: int) -> bool:
    """Take what is there, up to one byte above `most` in all; False at the stream's end."""
    try:
        chunk = os.read(stream, min(65536, most + 1 - len(into)))
    except BlockingIOError:
        return True
    into += chunk
    return bool(chunk)


def _passed(streams: dict[int, bytearray], limits: Limits, start: float, running: bool) -> str | None:
    if any(len(text) > limits.output_bytes for text in streams.values()):
        return "output"
    return "time" if running and time.monotonic() - start >= limits.seconds else None


def _drain(pipes: tuple[IO[bytes], IO[bytes]], streams: dict[int, bytearray], limits: Limits) -> str | None:
    """What the process left in the pipes when it ended: their capacity at most."""
    for pipe in pipes:
        text, before = streams[pipe.fileno()], -1
        while before < len(text) <= limits.output_bytes:
            before = len(text)
            _read(pipe.fileno(), text, limits.output_bytes)
        if len(text) > limits.output_bytes:
            return "output"
    return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Before the process is waited for: until then its number, which is the group's, cannot be given to another."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.wait()


def _limit_by_ending(status: int, seconds: float, stderr: str, limits: Limits) -> str | None:
    # SIGKILL from elsewhere than here: the kernel's for a program that ignored SIGXCPU, or for want of memory.
    if status == -signal.SIGXCPU or (status == -signal.SIGKILL and seconds >= limits.cpu_seconds):
        return "cpu"
    last = stderr.rstrip().rpartition("\n")[2]
    if last.startswith("MemoryError"):
        return "memory"
    return "file_size" if last.startswith(f"OSError: [Errno {errno.EFBIG}]") else None
