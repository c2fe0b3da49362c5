"""Calls of tools that end in the moment in which something else happens to them."""

import asyncio
import threading
import time

from colora.rollout.tool_calls import Call, ToolCaller, _serve


class PausedLoop(asyncio.SelectorEventLoop):
    """A loop whose thread gets no time between two lines: when it has made a task and nobody can cancel that yet."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def create_task(self, coro, **options):  # type: ignore[no-untyped-def]
        task = super().create_task(coro, **options)
        self.goes_on.wait(60)
        return task


def test_a_coroutine_that_is_cut_off_while_it_is_started_does_not_run() -> None:
    ran: list[bool] = []

    async def hang() -> None:
        ran.append(True)
        await asyncio.Event().wait()

    caller, loop = ToolCaller(), PausedLoop()
    caller._loops.append(loop)
    threading.Thread(target=_serve, args=(loop,), daemon=True).start()
    call = Call(None, hang, {}, timeout=0.2)
    caller.start(call)
    assert caller.wait(60) == [call] and call.timed_out and caller.abandoned == 1
    loop.goes_on.set()
    deadline = time.monotonic() + 5
    while caller.abandoned and time.monotonic() < deadline:
        caller.wait(0.01)
    caller.close()
    assert caller.abandoned == 0 and not ran
