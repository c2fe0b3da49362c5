"""Reward functions in worker processes: what hangs, dies or swells costs its own sample and nothing else."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.processes import _look
from colora.rewards.runner import RewardError, RewardRunner

LIMITS = PoolLimits(workers=2, timeout=1.5, memory_gib=0.125)

VERIFIERS = """
import ctypes, functools, os, signal, subprocess, sys, time

def swell():
    # Over the limit on memory, which the pool finds in its time, and under the one on the data segment.
    return [bytearray(b"x" * (1 << 22)) for _ in range(36)]

def verify(completions, **kwargs):
    return [_verify(completion) for completion in completions]

def _verify(text):
    if text == "hang":
        while True: pass
    if text == "child":
        child = subprocess.Popen(["sleep", "300"])
        with open(CHILD + ".new", "w") as file: file.write(str(child.pid))
        os.replace(CHILD + ".new", CHILD)
        kept = swell(); child.wait()
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "swell":
        kept = swell(); time.sleep(300)
    if text == "huge":
        return len(bytearray(1 << 36))
    if text == "print":
        print("spam " * 400_000); sys.stderr.write("spam " * 400_000)
    if text == "raise":
        raise OSError(2, "no such proof")
    return float(len(text))

def alarmed(completions, **kwargs):
    class TimeUp(Exception): pass
    def stop(*_): raise TimeUp
    left_behind = signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0)
    signal.signal(signal.SIGALRM, stop)
    scores = []
    for completion in completions:
        try:
            if completion == "slow":
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                time.sleep(60)
            scores.append(1.0)
        except TimeUp:
            scores.append(0.0)
    signal.alarm(300)  # it would end a later call
    return [None] * len(scores) if left_behind else scores

def logs(completions, trainer_state, log_extra, log_metric, answer):
    log_extra("pid", [os.getpid()] * len(completions))
    log_metric("size", len(completions))
    try:
        trainer_state.global_step = 0
    except AttributeError:
        return [trainer_state.global_step + given for given in answer]

def groups(completions, **kwargs):
    return [len(completions)] * len(completions)

def generator(completions, **kwargs):
    return (1.0 for _ in completions)

def torch_loaded(completions, **kwargs):
    return [float("torch" in sys.modules)] * len(completions)

scaled = functools.partial(verify, scale=2)
"""


@pytest.fixture
def verifiers(tmp_path):
    file = tmp_path / "verifiers.py"
    file.write_text(VERIFIERS.replace("CHILD", repr(str(tmp_path / "child"))))
    return lambda name: load_reward(f"{file}:{name}")


@pytest.fixture
def make():
    runners = []

    def runner(function, **options):
        runners.append(RewardRunner([function], workers=options.pop("limits", LIMITS), **options))
        return runners[-1]

    yield runner
    for each in runners:
        each.close()


def score(runner, completions, prompts=None, state=None, **columns):
    prompts = prompts or [f"question {index}" for index in range(len(completions))]
    return runner.score(prompts, completions, [[1]] * len(completions), columns, trainer_state=state, step=7)


def runs(number):
    """Whether a process is there and not a zombie, which is its parent's to wait for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends between opening and reading
        return False


def children():
    """This process's children, zombies included. The kernel's own list can miss some while another one ends."""
    found = set()
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int(Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()[1])
            found |= {int(number)} if parent == os.getpid() else set()
    return found


def test_bad_samples_cost_only_themselves(make, verifiers):
    before = children()
    runner = make(verifiers("verify"))
    completions = ["x" * (index % 5) for index in range(240)]
    bad = {10: "hang", 60: "exit", 61: "segfault", 100: "swell", 101: "huge", 150: "print"}
    for index, text in bad.items():
        completions[index] = text
    resident, where_it_hung = [], []
    for _ in range(3):
        scores = score(runner, completions)
        expected = [float(len(text)) for text in completions]
        lost = {failure.sample: failure for failure in scores.failures}
        assert set(lost) == {10, 60, 61, 100, 101}
        assert scores.values[:, 0].isnan().nonzero().flatten().tolist() == sorted(lost)
        assert all(
            value == right
            for value, right in zip(scores.values[:, 0].tolist(), expected, strict=True)
            if value == value
        )
        kinds = Counter(failure.kind for failure in scores.failures)
        assert kinds == {"timeout": 1, "died": 2, "memory": 2}
        assert "did not return within 1.5 s" in lost[10].reason
        where_it_hung.append("in _verify" in lost[10].reason)
        assert "ended with exit status 3" in lost[60].reason and "SIGSEGV" in lost[61].reason
        assert "over 0.125 GiB" in lost[100].reason and "MemoryError" in lost[101].reason
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert any(where_it_hung)  # a worker that does not run in the second after it is asked has no time to write it
    assert (resident[-1] - resident[0]) * os.sysconf("SC_PAGE_SIZE") < 8 << 20
    runner.close()
    assert children() <= before


def test_processes_of_a_lost_worker_end_with_it(make, verifiers, tmp_path):
    limits = PoolLimits(1, timeout=60, memory_gib=LIMITS.memory_gib)
    (lost,) = score(make(verifiers("verify"), limits=limits, failure_share=1), ["child"]).failures
    assert lost.kind == "memory"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(child)


def test_alarms_work(make, verifiers):
    runner = make(verifiers("alarmed"), limits=PoolLimits(1, timeout=20))
    assert score(runner, ["", "slow", ""]).values[:, 0].tolist() == [1, 0, 1]
    scores = score(runner, ["", "slow"])
    assert scores.values[:, 0].tolist() == [1, 0] and not scores.failures


def test_logs_state_and_columns_cross(make, verifiers):
    state = SimpleNamespace(global_step=5, log_history=[{}] * 1000)
    scores = score(make(verifiers("logs")), ["a"] * 9, state=state, answer=list(range(9)))
    assert scores.values[:, 0].tolist() == [5.0 + index for index in range(9)]
    assert os.getpid() not in scores.extra["pid"] and len(scores.extra["pid"]) == 9
    assert scores.metrics == {"size": 3.0}  # calls of 4, 4 and 1


def test_groups_stay_whole_and_partials_load(make, verifiers):
    prompts = ["p"] * 6 + ["q"] * 3 + ["r"] * 5
    sizes = score(make(verifiers("groups")), ["a"] * 14, prompts).values[:, 0].tolist()
    assert sizes == [6.0] * 6 + [8.0] * 8
    assert score(make(verifiers("scaled")), ["abc"]).values.item() == 3


def test_an_object_of_another_file_holds_functions_of_the_rewards_file(make, tmp_path):
    (tmp_path / "sums_of_rewards.py").write_text(
        "class Sum:\n    def __init__(self, *terms):\n        self.terms = terms\n"
        "    def __call__(self, completions):\n        return [sum(term(c) for term in self.terms)"
        " for c in completions]"
    )
    file = tmp_path / "mine.py"
    file.write_text(
        "import sums_of_rewards as s\n\ndef half(text):\n    return len(text) / 2\n\nboth = s.Sum(half, half)"
    )
    runner = make(load_reward(f"{file}:both"))
    assert "Sum" in runner._pooled and score(runner, ["abc"]).values.item() == 3


def test_a_function_that_ends_its_worker_is_shown(make, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import sys\n\ndef leaves(completions):\n    sys.exit('no verifier is installed')")
    with pytest.raises(RewardError, match=r"(?s)exit status 1.*in leaves.*SystemExit: no verifier is installed"):
        score(make(load_reward(f"{file}:leaves")), ["a"])


def test_exceptions(make, verifiers):
    completions = ["a", "raise", "abc", "a", "a", "a"]
    with pytest.raises(RewardError, match="sample 1: it raised FileNotFoundError") as caught:
        score(make(verifiers("verify")), completions)
    assert "in _verify" in "".join(caught.value.__cause__.__notes__)
    scores = score(make(verifiers("verify"), on_error="none"), completions)
    assert [failure.sample for failure in scores.failures] == [1] and scores.values[2] == 3
    with pytest.raises(RewardError, match=r"(?s)cannot be sent.*generator"):
        score(make(verifiers("generator")), completions)


def test_too_many_failures_stop(make, verifiers):
    runner = make(verifiers("verify"), failure_share=0.25)
    assert len(score(runner, ["exit", "a", "a", "a"]).failures) == 1
    with pytest.raises(RewardError, match=r"(?s)exit status 3.*2 of 4 samples.*0\.25"):
        score(runner, ["exit", "a", "a", "exit"])
    with pytest.raises(ValueError, match="failure_share=2"):
        make(verifiers("verify"), failure_share=2)
    with pytest.raises(ValueError, match="positive limits"):
        PoolLimits(workers=1, timeout=0)


class Holder:
    def __init__(self, held):
        self.held = held

    def __call__(self, completions, **kwargs):
        return [float(os.getpid())] * len(completions)


@pytest.mark.parametrize(
    "held, reason", [(torch.nn.Linear(1, 1), "holds a Linear"), (threading.Lock(), "pickle '_thread.lock'")]
)
def test_what_cannot_travel_runs_here(make, caplog, held, reason):
    scores = score(make(Holder(held)), ["a"])
    assert scores.values.item() == float(torch.tensor(float(os.getpid())))
    (record,) = caplog.records
    assert "runs in this process" in record.getMessage() and reason in record.getMessage()


def test_lambdas_run_here(make):
    here = lambda completions, **_: [float(threading.current_thread() is threading.main_thread())]  # noqa: E731
    assert score(make(here), ["a"]).values.item() == 1


def test_workers_start_without_torch(make, verifiers):
    assert score(make(verifiers("torch_loaded")), ["a"]).values.item() == 0


def test_a_process_that_ends_while_it_is_looked_at():
    """Between opening and reading its file, which happens to dozens of these on any machine."""
    seen = set()
    for _ in range(100):
        with subprocess.Popen(["true"]) as process:
            waiting = threading.Thread(target=process.wait)
            waiting.start()
            while waiting.is_alive():
                seen.add(_look(process.pid)[0])
            assert _look(process.pid) == ("?", 0)
    assert seen <= set("RSDZX?")


def test_workers_end_with_a_killed_parent(verifiers, tmp_path):
    script = (
        "from colora.rewards.loading import load_reward; from colora.rewards.pool import WorkerPool, PoolLimits\n"
        "from colora.rewards.pooled import _reference; from colora.rewards.worker import pack_call\n"
        "from colora.rewards.calls import RewardFunction\n"
        f"verify = load_reward({str(tmp_path / 'verifiers.py')!r} + ':verify')\n"
        "reference = _reference(RewardFunction(verify, 'verify'))\n"
        "pool = WorkerPool(PoolLimits(1), {0: reference})\n"
        "pool.submit(pack_call(0, reference, [], {'completions': ['child']}), print)\n"
        "while pool.unfinished: pool.poll(1)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as parent:
        child = tmp_path / "child"
        deadline = time.monotonic() + 60
        while not child.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [int(child.read_text())]  # the function's own child, the worker, and what that was forked from
        for _ in range(2):
            left.append(int(Path(f"/proc/{left[-1]}/stat").read_text().split()[3]))
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(runs, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, left))
