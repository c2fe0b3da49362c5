"""Where reward workers come from: what they share, what they must not, and what becomes of a server that fails."""

import os
import pickle
import signal
import subprocess
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.reduction import send_handle
from pathlib import Path

import pytest
from colora.rewards import fork_server
from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.runner import RewardError, RewardRunner
from colora.rewards.worker import FunctionReference, pack_call

from .test_pool import children, runs

MODULE = """
import os, random, sys, threading, time
WORKERS = any("serve_forks" in argument for argument in sys.orig_argv)  # not the process of the tests
SERVER = WORKERS and os.getsid(0) == os.getpid()
{more}
IMPORTED_IN = os.getpid()

def where(completions, log_extra, **kwargs):
    if "exit" in completions:
        sys.exit(5)
    log_extra("imported_in", [IMPORTED_IN] * len(completions))
    log_extra("called_in", [os.getpid()] * len(completions))
    log_extra("parent", [os.getppid()] * len(completions))
    log_extra("random", [random.random()] * len(completions))
    log_extra("files", [sorted(map(int, os.listdir("/proc/self/fd")))] * len(completions))
    log_extra("prepared_in", [PREPARED_IN] * len(completions))
    log_extra("leads", [os.getpgrp()] * len(completions))
    return [1.0] * len(completions)

PREPARED_IN = []
where.prepare_worker = lambda: PREPARED_IN.append(os.getpid())
"""


@pytest.fixture
def make(tmp_path):
    runners = []

    def runner(more="", workers=2):
        file = tmp_path / "module.py"
        file.write_text(MODULE.format(more=more))
        limits = PoolLimits(workers, timeout=30)
        runners.append(RewardRunner([load_reward(f"{file}:where")], workers=limits))
        return runners[-1]

    yield runner
    for each in runners:
        each.close()


def score(runner, completions):
    return runner.score(list(range(len(completions))), completions, [[1]] * len(completions), {})


def test_workers_share_the_imports_and_nothing_else(make):
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    extra = score(make(), ["a"] * 40).extra
    os.close(inherited)
    workers = set(extra["called_in"])
    assert len(workers) == 2 and extra["leads"] == extra["called_in"]
    (server,) = set(extra["parent"])
    assert set(extra["imported_in"]) == {server} and server not in workers | {os.getpid()}
    assert extra["prepared_in"] == [[server]] * 40
    assert len(set(extra["random"])) == 10  # calls of 4; a generator that was copied would give its numbers twice
    for files in extra["files"]:
        assert files[:3] == [0, 1, 2] and len(files) == 5  # and the connection, and the listing itself


def test_a_lost_worker_is_replaced_without_another_import(make):
    runner = make(workers=1)
    first = score(runner, ["a"] * 4).extra
    scores = score(runner, ["a"] * 4 + ["exit", "a", "a", "a"])
    assert "ended with exit status 5" in scores.failures[0].reason and scores.values.isnan().sum() == 1
    again = score(runner, ["a"] * 4).extra
    assert first["imported_in"] == again["imported_in"] and not set(first["called_in"]) & set(again["called_in"])


@pytest.mark.parametrize(
    "more",
    [
        "threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()",
        "kept = open(os.devnull)",
        "if SERVER: raise RuntimeError('not here')",
    ],
    ids=["thread", "file", "error"],
)
def test_workers_import_for_themselves_what_must_not_be_shared(make, more):
    extra = score(make(more), ["a"] * 8).extra
    assert extra["imported_in"] == extra["called_in"] and set(extra["parent"]) != {os.getpid()}


def test_an_import_that_ends_the_process_is_reported(make, caplog):
    with pytest.raises(RewardError, match=r"(?s)ended with exit status 9.*8 of 8 samples"):
        score(make("if WORKERS: print('at the door', flush=True); os._exit(9)"), ["a"] * 8)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "importing the reward functions in advance failed" in message and "at the door" in message


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends between opening and reading
        return True


def test_scoring_goes_on_where_the_server_was_killed(make):
    runner = make(workers=1)
    (server,) = set(score(runner, ["a"] * 4).extra["parent"])
    assert server in children()
    os.kill(server, signal.SIGKILL)
    while not has_ended(server):  # until then its workers have it as their parent
        time.sleep(0.01)
    scores = score(runner, ["a"] * 20)
    assert (scores.values == 1).all() and set(scores.extra["parent"]) != {server}
    runner.close()
    assert not Path(f"/proc/{server}").exists()


def test_how_a_worker_ended_is_known_where_a_module_ignores_its_children(make):
    """Ignored, they are reaped by the kernel: the server would find none to wait for and end, with all its workers."""
    ignoring = "import signal\nif WORKERS: signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    runner = make(ignoring, workers=1)
    scores = score(runner, ["a"] * 4 + ["exit"] + ["a"] * 3)
    (failure,) = scores.failures
    assert "its worker process ended with exit status 5" in failure.reason
    assert set(scores.extra["parent"]) - {None} == set(score(runner, ["a"] * 4).extra["parent"])


HANGING = """
import os, re, subprocess

def hang(completions):
    child = subprocess.Popen(["sleep", "300"])
    with open("{told}.new", "w") as file: file.write(f"{{os.getpid()}} {{child.pid}}")
    os.replace("{told}.new", "{told}")
    re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock
"""


class HangingServer:
    """A server with one worker, which hangs in C code and has a child."""

    def __init__(self, folder: Path):
        told, file = folder / "told", folder / "hanging.py"
        file.write_text(HANGING.format(told=told))
        self.control, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                fork_server.command(theirs.fileno(), 1 << 33, preload=False),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert self.control.recv() == "ready"
        self.worker, theirs = Pipe()
        self.control.send(("fork", 0))
        with theirs, tempfile.TemporaryFile() as log:
            for descriptor in (theirs.fileno(), log.fileno()):
                send_handle(self.control, descriptor, self.process.pid)
            self.number = self.control.recv()
        reference = FunctionReference(pickle.dumps(load_reward(f"{file}:hang")), (str(file),))
        self.worker.send_bytes(pack_call(0, reference, [], {"completions": ["a"]}))
        while not told.exists():
            time.sleep(0.01)
        self.left = list(map(int, told.read_text().split()))

    def all_ended(self, numbers: list[int]) -> bool:
        """Waits for it, for a minute."""
        deadline = time.monotonic() + 60
        while any(map(runs, numbers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not any(map(runs, numbers))


@pytest.mark.parametrize("at", ["rest", "an answer", "half a request"])
def test_a_pool_that_is_killed_at_any_moment_leaves_nothing_behind(tmp_path, at):
    server = HangingServer(tmp_path)
    os.kill(server.process.pid, signal.SIGSTOP)
    if at == "an answer":
        server.control.send(("how", server.number))  # takes it a second, then nobody hears
    if at == "half a request":
        server.control.send(("fork", 0))
    server.control.close()
    server.worker.close()
    os.kill(server.process.pid, signal.SIGCONT)
    assert server.process.wait(60) == 0
    assert server.all_ended(server.left)


def test_a_worker_that_hangs_in_c_code_ends_with_a_killed_server(tmp_path):
    server = HangingServer(tmp_path)
    server.process.kill()
    server.process.wait()
    number, child = server.left
    assert number == server.number and server.all_ended([number])
    os.kill(child, signal.SIGKILL)  # only a server that ends by itself ends those too
    server.control.close()
    server.worker.close()
