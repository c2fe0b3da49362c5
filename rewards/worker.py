"""The loop of a worker process: gets a reward function and a batch, calls it on its main thread, sends the answer back.

Imports nothing heavy: a worker's memory is what the reward functions import, and not torch.
"""

import ctypes
import faulthandler
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from .call_log import CallLog
from .loading import load_reward_file

PR_SET_PDEATHSIG = 1  # prctl(2)
STARTED = b""  # sent when a function is loaded and its first call begins: importing it does not count as calling it


class StateView:
    """The plain values of a `trainer_state`, read-only; one that was left out is an `AttributeError` that says so."""

    def __init__(self, values: dict[str, Any]):
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"trainer_state is a read-only copy in a reward worker: {name!r} cannot be set")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no plain value {name!r} in a reward worker")


@dataclass(frozen=True)
class FunctionReference:
    """How a worker gets a function: `pickled`, after loading `files`, the modules in it that `load_reward` made."""

    pickled: bytes
    files: tuple[str, ...] = ()

    def load(self) -> Callable:
        for file in self.files:
            load_reward_file(file)
        return pickle.loads(self.pickled)


@dataclass
class Answer:
    """What came of a call: what the function returned and logged, or the exception that it raised.

    `lost` is set by the pool instead, to "timeout", "memory" or "died", where the worker did not survive the call.
    """

    returned: Any = None
    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    raised: BaseException | None = None
    lost: str | None = None
    seconds: float = 0.0


def serve(connection: Connection, functions: dict[int, Callable]) -> None:
    """Answer calls until the other end of the connection is closed. `functions`, by number, are loaded already."""
    faulthandler.enable(all_threads=False)  # a crash leaves its stack in the log
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # asked for before a worker that hangs is killed
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        connection.send_bytes(_answer(message, functions, connection))


def _answer(message: bytes, functions: dict[int, Callable], connection: Connection) -> bytes:
    log, start = CallLog(), time.perf_counter()
    try:
        number, reference, logs, arguments = pickle.loads(message)
        if number not in functions:
            functions[number] = reference.load()
            start = time.perf_counter()
        connection.send_bytes(STARTED)
        arguments |= {name: getattr(log, name) for name in logs}
        try:
            returned = functions[number](**arguments)
        finally:  # an alarm that it left behind would end the worker, or the next call
            signal.setitimer(signal.ITIMER_REAL, 0)
        answer = Answer(returned, log.extra, log.metrics)
    except Exception as error:  # whatever a user's function raises is reported by name and sample
        answer = Answer(raised=_portable(error))
    answer.seconds = time.perf_counter() - start
    try:
        return pickle.dumps(answer)
    except Exception as error:  # a result that cannot be sent, such as a generator: any __reduce__ may raise anything
        kind = type(answer.returned).__name__
        message_text = f"what it returned ({kind}) or logged cannot be sent from its worker process: {error}"
        return pickle.dumps(Answer(raised=TypeError(message_text), seconds=answer.seconds))


def _portable(error: Exception) -> Exception:
    """`error` with its traceback as a note, since that does not survive pickling; another one where it cannot be."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class with a constructor of its own
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the reward worker:\n{text}")
    return error


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, which may have happened already.

    A worker that hangs does not see that the other end of its connection is closed, and one that hangs in C code, as in
    a regular expression, lets no thread look for it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def pack_call(number: int, reference: FunctionReference, logs: list[str], arguments: dict[str, Any]) -> bytes:
    """A call as it travels: the function's number and reference, which of log_extra, log_metric it takes, the rest.

    Raises what pickling an argument raises.
    """
    return pickle.dumps((number, reference, logs, arguments))


def unpack_answer(message: bytes) -> Answer:
    """The answer of a worker, or one with what was raised by unpickling it."""
    try:
        return pickle.loads(message)
    except Exception as error:  # a class of the user's that is not found here, for instance
        return Answer(raised=TypeError(f"what its worker process sent cannot be read: {type(error).__name__}: {error}"))
