"""Calls of tools beside the engine: functions in threads, coroutines in a loop, each with a limit on its time.

A function that hangs cannot be stopped from outside. Its thread is abandoned: it is counted, what it returns later is
dropped, and as a daemon it does not keep the process from ending.
"""

import asyncio
import heapq
import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

CANCELLATION_SECONDS = 0.5  # a loop that has not ended a cancelled coroutine by then is blocked


@dataclass(eq=False)
class Call:
    """One call of a tool, and how it ended.

    Attributes:
        owner: whoever asked for it; not looked at.
        function: sync or async.
        arguments: by name.
        timeout: seconds that it may run, or None.
        then: the call that starts when this one has ended: what one environment is asked keeps its order.
        convert: applied to what it returns, beside the engine too; what this raises counts as raised by the function.
        result: what it returned, converted.
        error: what it raised.
        timed_out: it was cut off.
        seconds: that it ran.
    """

    owner: Any
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    timeout: float | None = None
    then: "Call | None" = None
    convert: Callable[[Any], Any] | None = None
    result: Any = None
    error: BaseException | None = None
    timed_out: bool = False
    seconds: float = 0.0
    _started: float = 0.0
    _ended: bool = False
    _cancel: Callable[[], object] | None = None


class ToolCaller:
    """Runs calls concurrently and hands them back as they end. To be used from one thread at a time.

    Args:
        max_threads: functions that run at once, those that were abandoned not counted; further ones wait, and their
            time begins when they start.

    Attributes:
        abandoned: calls that were cut off and have not ended yet.

    Raises:
        ValueError: max_threads is below 1.
    """

    def __init__(self, max_threads: int = 64):
        if max_threads < 1:
            raise ValueError(f"ToolCaller: max_threads must be at least 1, got {max_threads}")
        self.abandoned = 0
        self._max_threads, self._threads = max_threads, 0
        self._waiting: deque[Call] = deque()
        self._returned: queue.SimpleQueue[tuple[Call, Any, BaseException | None]] = queue.SimpleQueue()
        self._deadlines: list[tuple[float, int, Call]] = []
        self._number = count()
        self._running = 0
        self._loops: list[asyncio.AbstractEventLoop] = []  # the last one is used
        self._cancelled_at: dict[Call, float] = {}  # coroutines cut off in the present loop that have not ended

    @property
    def busy(self) -> int:
        """Calls that were started and not handed back."""
        return self._running + len(self._waiting)

    def start(self, call: Call) -> None:
        """Begin a call, or queue it where as many functions run as may."""
        if is_async(call.function):
            self._begin(call)
            loop = self._usable_loop()
            loop.call_soon_threadsafe(self._launch, loop, call)
        else:
            self._waiting.append(call)
            self._start_threads()

    def wait(self, timeout: float | None) -> list[Call]:
        """The calls that have ended, by themselves or because their time was up, possibly none.

        Args:
            timeout: seconds to wait for the first; 0 does not wait, None waits for as long as something runs.
        """
        if not self.busy and timeout is None:
            return []
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            ended = self._collect(until)
            if ended or (until is not None and time.monotonic() >= until):
                return ended

    def close(self) -> None:
        """Stop the event loop; threads end with what they run, or with the process."""
        for loop in self._loops:
            loop.call_soon_threadsafe(loop.stop)
        self._loops.clear()

    def _collect(self, until: float | None) -> list[Call]:
        """What has ended by the next deadline, by `until`, or when something returns, whichever comes first."""
        limits = [limit for limit in (until, self._deadlines[0][0] if self._deadlines else None) if limit is not None]
        ended = []
        try:
            patience = max(0.0, min(limits) - time.monotonic()) if limits else None
            ended += self._take(*(self._returned.get(timeout=patience) if patience != 0.0 else self._next()))
            while True:
                ended += self._take(*self._next())
        except queue.Empty:
            pass
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2]._ended):
            call = heapq.heappop(self._deadlines)[2]
            if not call._ended:
                ended.append(self._cut_off(call, now))
        return ended

    def _next(self) -> tuple[Call, Any, BaseException | None]:
        return self._returned.get_nowait()

    def _take(self, call: Call, result: Any, error: BaseException | None) -> list[Call]:
        """Note that a call has come back; nothing to hand on where it was cut off before."""
        if call._ended:
            self.abandoned -= 1
            self._cancelled_at.pop(call, None)
            return []
        call.result, call.error = result, error
        self._end(call, time.monotonic())
        return [call]

    def _cut_off(self, call: Call, now: float) -> Call:
        call.timed_out = call._ended = True  # before `_cancel` is looked for: see `_await`
        self.abandoned += 1
        if is_async(call.function):
            self._cancelled_at[call] = now
        if call._cancel is not None:
            call._cancel()
        self._end(call, now)
        return call

    def _end(self, call: Call, now: float) -> None:
        call._ended, call.seconds = True, now - call._started
        self._running -= 1
        self._threads -= not is_async(call.function)
        if call.then is not None:
            self.start(call.then)
        self._start_threads()

    def _begin(self, call: Call) -> None:
        call._started = time.monotonic()
        self._running += 1
        if call.timeout is not None:
            heapq.heappush(self._deadlines, (call._started + call.timeout, next(self._number), call))

    def _start_threads(self) -> None:
        while self._waiting and self._threads < self._max_threads:
            call = self._waiting.popleft()
            self._threads += 1
            self._begin(call)
            threading.Thread(target=self._run, args=(call,), name="colora-tool", daemon=True).start()

    def _run(self, call: Call) -> None:
        result, error = None, None
        try:
            result = _converted(call, call.function(**call.arguments))
        except BaseException as raised:  # SystemExit included: whatever a tool raises is for whoever asked
            error = raised
        self._returned.put((call, result, error))

    # ---- coroutines --------------------------------------------------------------------------------------------------

    def _usable_loop(self) -> asyncio.AbstractEventLoop:
        """The loop, or a fresh one where a coroutine blocks it: further ones must not hang with that one."""
        now = time.monotonic()
        blocked = any(now - at > CANCELLATION_SECONDS for at in self._cancelled_at.values())
        if blocked or not self._loops:
            self._cancelled_at.clear()
            self._loops.append(asyncio.new_event_loop())
            self._loops[-1].set_default_executor(_DaemonThreads())
            threading.Thread(target=_serve, args=(self._loops[-1],), name="colora-tool-loop", daemon=True).start()
        return self._loops[-1]

    def _launch(self, loop: asyncio.AbstractEventLoop, call: Call) -> None:
        task = loop.create_task(self._await(call))
        call._cancel = lambda: loop.call_soon_threadsafe(task.cancel)

    async def _await(self, call: Call) -> None:
        result, error = None, None
        try:
            # Where its time was up before a blocked loop came to it, perhaps before it could be cancelled: not at all.
            if not call._ended:
                result = _converted(call, await call.function(**call.arguments))
        except BaseException as raised:  # CancelledError too, where the tool raises it itself
            error = raised
        self._returned.put((call, result, error))


class _DaemonThreads(ThreadPoolExecutor):
    """Where a loop runs what coroutines hand to `asyncio.to_thread`: a thread each.

    Those of its base class are few, so that some that hang would stop all others, and the process waits for them.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as raised:  # for whoever awaits it
                    future.set_exception(raised)

        threading.Thread(target=run, name="colora-tool", daemon=True).start()
        return future


def _converted(call: Call, result: Any) -> Any:
    return result if call.convert is None else call.convert(result)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
