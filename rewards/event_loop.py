"""An event loop on a thread of its own, so that async functions can be run from anywhere, a running loop included."""

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
INTERRUPTIBLE_SECONDS = 0.25


class EventLoopThread:
    """Runs coroutines on a daemon thread. The loop lives as long as this object, so clients bound to it can be kept."""

    def __init__(self, name: str):
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        thread = threading.Thread(target=_serve, args=(started,), name=name, daemon=True)
        thread.start()
        self._loop = started.result()
        self._finalizer = weakref.finalize(self, _stop, self._loop, thread)

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> "concurrent.futures.Future[Result]":
        """Start a coroutine. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs and stop the loop. May be called twice."""
        self._finalizer()


def wait_for(future: "concurrent.futures.Future[Result]") -> Result:
    """The result, waited for so that Ctrl-C always ends the wait.

    One that comes between Python's last look for signals and the system call that waits is seen only after the call:
    so none lasts long.
    """
    while not future.done():
        concurrent.futures.wait([future], timeout=INTERRUPTIBLE_SECONDS)
    return future.result()


def _serve(started: "concurrent.futures.Future[asyncio.AbstractEventLoop]") -> None:
    with asyncio.Runner() as runner:  # on leaving, it cancels the remaining tasks, waits for them and closes the loop
        loop = runner.get_loop()
        started.set_result(loop)
        loop.run_forever()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)  # a function that blocks the loop keeps the thread longer; it dies with the process then
