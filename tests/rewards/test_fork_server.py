"""Where reward workers come from: what they share, what they must not, and what becomes of a server that fails."""

import os
import signal
import time
from pathlib import Path

import pytest
from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.runner import RewardError, RewardRunner

from .test_pool import children

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
