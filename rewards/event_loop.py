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
    """Runs coroutines on a daemon thread. The loop lives as long as this object, so clients bound to it can be kept.

    Raises:
        OSError: no loop can be made, such as where too many files are open.
    """

    def __init__(self, name: str):
        self._loop = asyncio.new_event_loop()  # not by the thread, whose errors nobody would see
        thread = threading.Thread(target=_serve, args=(self._loop,), name=name, daemon=True)
        thread.start()
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


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    # On leaving, the runner cancels the remaining tasks, waits for them and closes the loop.
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)  # a function that blocks the loop keeps the thread longer; it dies with the process then
