"""Worker processes that can be killed: each call has a limit on its time and on its worker's memory."""

import heapq
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from .processes import GIB, Workers
from .worker import Answer, FunctionReference

POLL_SECONDS = 0.02  # how often memory and time are looked at; also what a worker can allocate beyond its limit in


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


@dataclass(order=True)
class _Call:
    """A call that waits or is under way; the smallest goes first."""

    rank: int
    order: int
    message: bytes = field(compare=False)
    done: Callable[[Answer], None] = field(compare=False)


class WorkerPool:
    """Runs calls in workers, which start when first needed and live until `close` or until a call loses them.

    Whoever submits calls also calls `poll` again and again: nothing happens in between, but that workers go on with the
    calls that they have. Not to be shared by threads.

    Args:
        limits: of the workers.
        functions: imported once for all workers, by the numbers that calls name them by.
    """

    def __init__(self, limits: PoolLimits, functions: Mapping[int, FunctionReference] | None = None):
        self.limits = limits
        self._workers = Workers(int(2 * limits.memory_gib * GIB), functions or {})
        self._queue: list[_Call] = []
        self._submitted = 0
        self._finalizer = weakref.finalize(self, self._workers.close)

    @property
    def unfinished(self) -> int:
        """Calls that wait or are under way."""
        return len(self._queue) + sum(each.task is not None for each in self._workers.running)

    def submit(self, message: bytes, done: Callable[[Answer], None], rank: int = 0) -> None:
        """Queue a call.

        Args:
            message: what `worker.pack_call` made.
            done: gets the answer, within a `poll`; may submit further calls.
            rank: lower ones go first.
        """
        heapq.heappush(self._queue, _Call(rank, self._submitted, message, done))
        self._submitted += 1

    def poll(self, seconds: float = 0.0) -> None:
        """Take the answers that have come, kill workers that are over a limit, give the free ones calls.

        Args:
            seconds: how long to wait, at most, for an answer.

        Raises:
            RuntimeError: workers cannot be started.
        """
        if not self.unfinished:
            return
        try:
            starting = self._assign()
            busy = [each for each in self._workers.running if each.task is not None]
            watched = [each.connection for each in busy] + ([starting] if starting is not None else [])
            ready = wait(watched, timeout=min([seconds, *(each.due_in() for each in busy)]))
            for each in busy:
                answer = each.receive() if each.connection in ready else each.over_limit(self.limits.memory_gib * GIB)
                if answer is None:
                    continue
                call, each.task = each.task, None
                assert isinstance(call, _Call)
                if answer.lost is not None:
                    self._workers.lose(each)
                call.done(answer)
            self._assign()  # whoever is free now need not wait for the next poll
        except BaseException:
            self.close()  # an answer to an abandoned call must not be taken for that of a later one
            raise

    def close(self) -> None:
        """Kill the workers and forget what was not answered. Submitting again starts new ones."""
        self._queue.clear()
        self._workers.close()

    def _assign(self) -> Connection | None:
        """Give waiting calls to free workers. Where more are wanted and cannot be had yet: what to wait for."""
        idle = [each for each in self._workers.running if each.task is None]
        while self._queue:
            if not idle:
                if len(self._workers.running) == self.limits.workers:
                    break
                starting = self._workers.starting()
                if starting is not None:
                    return starting
                started = self._workers.start()
                idle += [] if started is None else [started]
                continue
            each = idle.pop()
            if each.send(self._queue[0], self._queue[0].message, self.limits.timeout):
                heapq.heappop(self._queue)
            else:  # it ended while it was idle, as by a thread that a function left behind
                self._workers.lose(each)
        return None
