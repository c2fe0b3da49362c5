"""The process that reward workers are forked from.

It has imported the reward functions, so that another worker costs milliseconds instead of the start of Python and the
imports, and workers share the memory of what was imported. Not multiprocessing's fork server: that one is shared with
the reward functions' own use of multiprocessing, and its processes import the training script again, torch and all.

Forked processes share open files and connections, and a lock that a thread held stays locked in them. So where an
import leaves a file open or a thread running, the server starts itself anew without the imports, and each worker does
them. A worker leads a process group, to be killed as a whole, and its number stays its own until the pool says `end`.
"""

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import NoReturn

from .worker import FunctionReference, end_with_parent, serve

logger = logging.getLogger(__name__)
REAP_SECONDS = 0.005  # how often it is looked whether a killed worker has ended


def command(descriptor: int, memory_bytes: int, preload: bool) -> list[str]:
    """The command that starts the server with this process's import path. It is spoken to on `descriptor`."""
    arguments = f"{descriptor}, {memory_bytes}, {preload}"
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve_forks; serve_forks({arguments})"
    return [sys.executable, "-c", code]


def serve_forks(descriptor: int, memory_bytes: int, preload: bool) -> None:
    """Fork workers on request until the connection's other end is closed; then end those that are left.

    Requests are pairs. ("fork", 0), followed by the descriptors of the worker's connection and log, is answered with
    its process number; ("how", number) with how it ended, in words; ("end", number), without an answer, lets go of one
    that is dead or killed. The first message, with `preload`, is a dict of references to functions by number.

    Args:
        memory_bytes: limit on the data segment of the server and of each worker.
    """
    control = Connection(descriptor)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    functions = _load(control.recv()) if preload else {}
    if preload and not _can_be_forked():
        os.execv(sys.executable, command(descriptor, memory_bytes, preload=False))
    gc.freeze()  # a collection in a worker would write to, and so copy, the memory that is shared
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, how a worker ended would be forgotten, and its number free
    alive: set[int] = set()
    ended: set[int] = set()
    try:
        control.send("ready")
        _serve_requests(control, functions, alive, ended)
    except (EOFError, ConnectionError):
        pass  # the pool is gone, perhaps in the middle of a request
    finally:
        for number in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
        for number in alive | ended:
            os.waitpid(number, 0)


def _serve_requests(control: Connection, functions: dict[int, Callable], alive: set[int], ended: set[int]) -> NoReturn:
    """Until the connection breaks, which raises. `alive` and `ended` hold the workers that are to be waited for."""
    while True:
        if control.poll(REAP_SECONDS if ended else None):
            request, number = control.recv()
            if request == "fork":
                number = _fork(control, functions)
                alive.add(number)
                control.send(number)
            elif request == "how":
                control.send(_how_it_ended(number))
            else:
                alive.remove(number)
                ended.add(number)
        ended -= {number for number in ended if os.waitpid(number, os.WNOHANG)[0]}


def _load(references: dict[int, FunctionReference]) -> dict[int, Callable]:
    """The functions; those that cannot be loaded are left to the workers, whose calls then report why.

    One with an attribute `prepare_worker`, a function without arguments, has that called: for imports at first use.
    """
    functions = {}
    for number, reference in references.items():
        try:
            function = reference.load()
            getattr(function, "prepare_worker", lambda: None)()
        except Exception:  # whatever a user's module raises
            logger.debug("a reward function is left to its workers to load", exc_info=True)
            continue
        functions[number] = function
    return functions


def _can_be_forked() -> bool:
    """Whether there is one thread, as the system counts, and nothing is open but what the server opened."""
    usual = 5  # the standard streams, `control` and the listing itself
    return len(os.listdir("/proc/self/task")) == 1 and len(os.listdir("/proc/self/fd")) == usual


def _fork(control: Connection, functions: dict[int, Callable]) -> int:
    """The process number of a new worker."""
    descriptors = recv_handle(control), recv_handle(control)
    sys.stdout.flush()
    server = os.getpid()
    number = os.fork()
    if number == 0:
        _become_worker(control, *descriptors, functions, server)
    with contextlib.suppress(OSError):  # the worker does it too: whoever comes first
        os.setpgid(number, number)
    for descriptor in descriptors:
        os.close(descriptor)
    return number


def _become_worker(control: Connection, descriptor: int, log: int, functions: dict[int, Callable], server: int) -> None:
    """Serve and end the process; does not return."""
    status = 1
    try:
        os.setpgid(0, 0)
        control.close()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        if "numpy" in sys.modules:  # unlike Python's own generator, it is not seeded anew by a fork
            sys.modules["numpy"].random.seed()
        end_with_parent(server)
        serve(Connection(descriptor), functions)
        status = 0
    except SystemExit as ending:
        traceback.print_exc()  # where, for the reason that is recorded
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _how_it_ended(number: int) -> str:
    deadline = time.monotonic() + 1
    info = None
    while info is None and time.monotonic() < deadline:  # the connection closes a moment before the process ends
        info = os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        time.sleep(0.001)
    if info is None:
        return "closed its connection"
    if info.si_code == os.CLD_EXITED:
        return f"ended with exit status {info.si_status}"
    return f"was ended by {signal.Signals(info.si_status).name}"
