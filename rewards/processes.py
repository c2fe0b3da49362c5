"""Reward workers as the pool sees them: processes that are given a call, watched, and killed."""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import IO

from . import fork_server, worker
from .worker import Answer, FunctionReference

logger = logging.getLogger(__name__)
START_SECONDS = 120.0  # for importing a function, which is not part of the call
DUMP_SECONDS, LATE_DUMP_SECONDS = 0.02, 1.0  # for a worker that is about to be killed to write where it hangs
LOG_BYTES = 1 << 20  # of a worker's prints: cut when longer
CLOSE_SECONDS = 5.0  # for the server to end its workers
GIB = 1 << 30


class Workers:
    """Worker processes and the server that forks them, which starts when first needed.

    Args:
        memory_bytes: a single allocation beyond it is a `MemoryError` in a worker.
        functions: what the server imports beforehand, by the number that calls have it under.

    Attributes:
        running: the workers that have not been lost.
    """

    def __init__(self, memory_bytes: int, functions: Mapping[int, FunctionReference]):
        self.running: list[WorkerProcess] = []
        self._memory_bytes, self._functions = memory_bytes, dict(functions)
        self._server: _Server | None = None

    def starting(self) -> Connection | None:
        """None when workers can be forked, else the connection on which there will be something to read.

        Raises:
            RuntimeError: the server does not start.
        """
        if self._server is None:
            self._server = _Server(self._memory_bytes, self._functions)
        if self._server.is_ready():
            return None
        if self._server.failed:
            reason = self._server.close()
            if not self._functions:
                raise RuntimeError(f"reward workers cannot be started: the process that they are forked from {reason}")
            logger.warning("importing the reward functions in advance failed, each worker does it now: it %s", reason)
            self._functions = {}
            self._server = _Server(self._memory_bytes, {})
        return self._server.control

    def start(self) -> "WorkerProcess | None":
        """Another worker; None where the server was found dead: ask `starting` again.

        Raises:
            RuntimeError: a new server could not fork.
        """
        assert self._server is not None and self._server.is_ready()
        connection, theirs = Pipe()
        log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # To append, which tempfile's own mode "a" does not ask the system for: cut to nothing, it begins anew.
        fcntl.fcntl(log, fcntl.F_SETFL, fcntl.fcntl(log, fcntl.F_GETFL) | os.O_APPEND)
        try:
            with theirs:
                number = self._server.fork(theirs, log)
        except (EOFError, OSError) as error:
            connection.close()
            log.close()
            reason, useless = self._server.close(), not self._server.has_forked
            self._server = None  # the workers that it forked end by themselves
            if useless:
                raise RuntimeError(f"the process that reward workers are forked from {reason}") from error
            return None
        self.running.append(WorkerProcess(connection, log, number, self._server))
        return self.running[-1]

    def lose(self, lost: "WorkerProcess") -> None:
        """End a worker."""
        self.running.remove(lost)
        lost.kill()

    def close(self) -> None:
        """End all of them and the server: nothing is left behind. Starting again is possible."""
        while self.running:
            self.running.pop().kill()
        if self._server is not None:
            self._server.close()
            self._server = None


class WorkerProcess:
    """One worker: the pool's end of its connection, its log, and the call that it is busy with.

    `task` is whatever the pool makes of it, None where the worker is idle.
    """

    def __init__(self, connection: Connection, log: IO[bytes], number: int, server: "_Server"):
        self.connection = connection
        self.task: object | None = None
        self._log, self._number, self._server = log, number, server
        self._since = self._deadline = self._timeout = 0.0
        self._asked_at: float | None = None  # to write where it hangs
        self._log_before = 0

    def send(self, task: object, message: bytes, timeout: float) -> bool:
        """Give it a call; False if it is dead."""
        try:
            self.connection.send_bytes(message)
        except OSError:
            return False
        self.task, self._timeout, self._since = task, timeout, time.monotonic()
        self._deadline, self._asked_at = self._since + START_SECONDS, None
        return True

    def receive(self) -> Answer | None:
        """The answer that has come in; None for the word that the call begins."""
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return self._lost("died", f"its worker process {self._server.how_it_ended(self._number)}")
        if message == worker.STARTED:
            self._since = time.monotonic()
            self._deadline = self._since + self._timeout
            return None
        self._cut_log()
        return worker.unpack_answer(message)

    def due_in(self) -> float:
        """Seconds until its time is up, or until it has had time to write where it hangs."""
        until = self._deadline if self._asked_at is None else max(self._asked_at, time.monotonic()) + DUMP_SECONDS
        return max(0.0, until - time.monotonic())

    def over_limit(self, memory_bytes: float) -> Answer | None:
        """The answer in place of the worker's if it has died or gone over a limit; it is to be killed then."""
        self._cut_log()
        state, used = _look(self._number)
        if state == "Z":
            if self.connection.poll():
                return None  # it answered and died then: the answer first
            return self._lost("died", f"its worker process {self._server.how_it_ended(self._number)}")
        if used > memory_bytes:
            return self._lost("memory", f"its worker used {used / GIB:.2f} GiB, over {memory_bytes / GIB:g} GiB")
        now = time.monotonic()
        if self._asked_at is None:
            if now > self._deadline:
                self._asked_at, self._log_before = now, os.fstat(self._log.fileno()).st_size
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._number, signal.SIGUSR1)  # faulthandler writes where it hangs
            return None
        written = os.fstat(self._log.fileno()).st_size > self._log_before
        if now > self._asked_at + (DUMP_SECONDS if written else LATE_DUMP_SECONDS):
            return self._lost("timeout", f"it did not return within {self._deadline - self._since:g} s")
        return None

    def kill(self) -> None:
        """End the process and the group it leads."""
        self._server.kill(self._number)
        self.connection.close()
        self._log.close()

    def _lost(self, kind: str, reason: str) -> Answer:
        tail = _read_tail(self._log)
        error = RuntimeError(reason + (f". It last wrote:\n{tail}" if tail else ""))
        return Answer(raised=error, lost=kind, seconds=time.monotonic() - self._since)

    def _cut_log(self) -> None:
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)


class _Server:
    """The pool's side of a fork server."""

    def __init__(self, memory_bytes: int, functions: Mapping[int, FunctionReference]):
        self.control, theirs = Pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._process = subprocess.Popen(
                fork_server.command(theirs.fileno(), memory_bytes, preload=bool(functions)),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # a context on the GPU would take memory of the training
            )
        self._deadline = time.monotonic() + START_SECONDS
        self._ready = self.failed = False
        self.has_forked = False
        if functions:
            with contextlib.suppress(OSError):  # it is gone: `is_ready` says so
                self.control.send(dict(functions))

    def is_ready(self) -> bool:
        """Whether it forks; where it does not, `failed` says whether it ever will."""
        if not self._ready:
            try:
                self._ready = self.control.poll() and bool(self.control.recv())
            except (EOFError, OSError):
                self.failed = True
            self.failed = self.failed or time.monotonic() > self._deadline
        return self._ready

    def fork(self, connection: Connection, log: IO[bytes]) -> int:
        """The process number of a new worker. Raises OSError or EOFError where the server is gone."""
        self.control.send(("fork", 0))
        for descriptor in (connection.fileno(), log.fileno()):
            send_handle(self.control, descriptor, self._process.pid)
        number = self.control.recv()
        self.has_forked = True
        return number

    def how_it_ended(self, number: int) -> str:
        """For a message."""
        try:
            self.control.send(("how", number))
            return self.control.recv()
        except (EOFError, OSError):
            return "ended with the process that it was forked from"

    def kill(self, number: int) -> None:
        """Kill a worker and the group it leads. Its number is its own while the server lives, which is told of it."""
        if self._process.poll() is not None:
            return  # its workers end by themselves
        with contextlib.suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.control.send(("end", number))

    def close(self) -> str:
        """End it; how it ended, for a message. It waits for its workers, so that none is left to whoever adopts it."""
        self.control.close()
        if not self._ready:
            self._process.kill()
        try:
            status = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        tail = _read_tail(self._log)
        self._log.close()
        return f"ended with status {status}" + (f". It last wrote:\n{tail}" if tail else "")


def _look(number: int) -> tuple[str, int]:
    """A process' state (Z: it has ended) and bytes of resident memory; ("?", 0) where the system does not say."""
    try:
        fields = Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends between opening and reading
        return ("?", 0)
    return fields[0].decode(), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _read_tail(log: IO[bytes], limit: int = 2000) -> str:
    """The last `limit` bytes of an open file, as text."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), limit, max(0, size - limit)).decode(errors="replace").strip()
