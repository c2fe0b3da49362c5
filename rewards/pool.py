"""Worker processes that can be killed: each call has a limit on its time and on its worker's memory."""

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

from . import worker
from .worker import Answer

POLL_SECONDS = 0.02  # how often memory and time are looked at; also what a worker can allocate beyond its limit in
START_SECONDS = 120.0  # for starting Python and importing the function, which is not part of the call
LOG_BYTES = 1 << 20  # of a worker's prints: cut when longer
GIB = 1 << 30


@dataclass(frozen=True)
class PoolLimits:
    """How many workers, and what each call may take.

    Attributes:
        workers: processes; at least 1.
        timeout: wall-clock seconds of one call.
        memory_gib: resident memory of a worker, what it imported included; it is killed beyond. A single allocation of
            more than twice that is a `MemoryError` in it, which also bounds the processes it starts, each by itself.
    """

    workers: int
    timeout: float = 60.0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.timeout <= 0 or self.memory_gib <= 0:
            raise ValueError(f"reward workers need at least one process and positive limits, got {self}")


class WorkerPool:
    """Runs calls in workers, which start when first needed and live until `close` or until a call loses them.

    A worker has a process group of its own, which is killed as a whole; a process that leaves the group is not.
    """

    def __init__(self, limits: PoolLimits):
        self.limits = limits
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def run(self, calls: list[bytes], again: Callable[[int], list[bytes]] = lambda task: []) -> list[Answer]:
        """The answer to each call, in order.

        Args:
            calls: what `worker.pack_call` made. Interrupted, the workers are killed.
            again: gets the place of a call that raised or lost its worker, and returns calls to make in its stead. They
                come next, so that the waiting of those that hang twice is shared by all workers; their answers are
                appended to the others.
        """
        calls = list(calls)
        answers: list[Answer | None] = [None] * len(calls)
        queue = deque(range(len(calls)))
        try:
            while queue or any(each.task is not None for each in self._workers):
                self._assign(queue, calls)
                busy = [each for each in self._workers if each.task is not None]
                ready = wait([each.connection for each in busy], timeout=POLL_SECONDS)
                for each in busy:
                    task = each.task
                    assert task is not None
                    answer = each.receive() if each.connection in ready else each.over_limit(self.limits)
                    if answer is None:
                        continue
                    answers[task] = answer
                    more = again(task) if answer.raised is not None else []
                    queue.extendleft(range(len(calls), len(calls) + len(more)))
                    calls += more
                    answers += [None] * len(more)
                    if answer.lost is not None:
                        self._workers.remove(each)
        except BaseException:
            self.close()  # an answer to an abandoned call must not be taken for that of a later one
            raise
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Kill the workers. Running again starts new ones."""
        _kill_all(self._workers)

    def _assign(self, queue: deque[int], calls: list[bytes]) -> None:
        idle = [each for each in self._workers if each.task is None]
        while queue and (idle or len(self._workers) < self.limits.workers):
            if idle:
                each = idle.pop()
            else:
                each = _Worker(int(2 * self.limits.memory_gib * GIB))
                self._workers.append(each)
            if each.send(queue[0], calls[queue[0]], self.limits.timeout):
                queue.popleft()
            else:  # it ended while it was idle, as by a thread that a function left behind
                each.kill()
                self._workers.remove(each)


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, data_bytes: int):
        self.connection, theirs = Pipe()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # To append, which tempfile's own mode "a" does not ask the system for: cut to nothing, it begins anew.
        fcntl.fcntl(self.log, fcntl.F_SETFL, fcntl.fcntl(self.log, fcntl.F_GETFL) | os.O_APPEND)
        with theirs:
            self.process = subprocess.Popen(
                worker.command(theirs.fileno(), data_bytes),
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # a context on the GPU would take memory of the training
            )
        self.task: int | None = None
        self._since = self._deadline = self._timeout = 0.0

    def send(self, task: int, message: bytes, timeout: float) -> bool:
        """Give it a call; False if it is dead."""
        try:
            self.connection.send_bytes(message)
        except OSError:
            return False
        self.task, self._timeout, self._since = task, timeout, time.monotonic()
        self._deadline = self._since + START_SECONDS
        return True

    def receive(self) -> Answer | None:
        """The answer that has come in; None for the word that the call begins."""
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return self._lose("died", f"its worker process {self._exit()}")
        if message == worker.STARTED:
            self._since = time.monotonic()
            self._deadline = self._since + self._timeout
            return None
        self.task = None
        self._cut_log()
        return worker.unpack_answer(message)

    def over_limit(self, limits: PoolLimits) -> Answer | None:
        """The answer in place of the worker's if it has died or gone over a limit; it is killed then."""
        self._cut_log()
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            if self.connection.poll():
                return None  # it answered and died then: the answer first
            return self._lose("died", f"its worker process {self._exit()}")
        if time.monotonic() > self._deadline:
            os.kill(self.process.pid, signal.SIGUSR1)  # faulthandler writes where it hangs
            time.sleep(POLL_SECONDS)
            return self._lose("timeout", f"it did not return within {self._deadline - self._since:g} s")
        used = _resident_bytes(self.process.pid)
        if used > limits.memory_gib * GIB:
            return self._lose("memory", f"its worker used {used / GIB:.2f} GiB, over {limits.memory_gib:g} GiB")
        return None

    def kill(self) -> None:
        """End the process and the group it leads, and wait for it: nothing is left behind."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # before it is waited for, the number is still its own
            self.process.wait()
        self.connection.close()
        self.log.close()

    def _exit(self) -> str:
        """How it ended, for a message."""
        deadline = time.monotonic() + 1
        info = None
        while info is None and time.monotonic() < deadline:  # the connection closes a moment before the process ends
            info = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0.001)
        if info is None:
            return "closed its connection"
        if info.si_code == os.CLD_EXITED:
            return f"ended with exit status {info.si_status}"
        return f"was ended by {signal.Signals(info.si_status).name}"

    def _lose(self, kind: str, reason: str) -> Answer:
        tail = worker.read_tail(self.log)
        error = RuntimeError(reason + (f". It last wrote:\n{tail}" if tail else ""))
        self.kill()
        return Answer(raised=error, lost=kind, seconds=time.monotonic() - self._since)

    def _cut_log(self) -> None:
        if os.fstat(self.log.fileno()).st_size > LOG_BYTES:
            os.ftruncate(self.log.fileno(), 0)


def _resident_bytes(pid: int) -> int:
    """0 where the system does not say: the limit on allocations holds there alone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
