"""A run of 30 steps, killed with SIGKILL ten times at random moments and resumed, is the run that was never killed.

Proof: adapter, optimizer, every logged value but the times, and every rollout file are compared bit by bit. The moments
are drawn from a fixed seed over what a run does: generating, scoring, training, writing checkpoints.
"""

import multiprocessing
import random
import runpy
import signal
import time
from importlib.util import find_spec
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from colora.rl.checkpoint import FINISHED, checkpoints

from ..run_files import assert_same_run, read_log
from ..tiny_runs import tiny_checkpoint
from ..vllm_engines import VLLM_MARKS

SCRIPT = Path(__file__).parents[1] / "killable_run.py"
STEPS, KILLS = 30, 10
MOMENTS = ("generating", "scoring", "training", "saving")
LATEST = 0.04  # seconds after the moment was told; a step with its checkpoint takes about as long
# Checkpoints at odd steps lie between two updates on the same rollouts, those at even steps between two generations.
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
RUNS: dict[str, dict[str, Any]] = {
    "two_iterations": {"num_iterations": 2, "beta": 0.02} | EVALUATING,
    "two_minibatches": {"steps_per_generation": 2, "logging_steps": 2, "save_total_limit": 2} | EVALUATING,
}


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported: a restart takes one second instead of ten."""
    context = multiprocessing.get_context("forkserver")
    vllm = ["vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3"]
    context.set_forkserver_preload(["colora.rl.trainer", "datasets", *(vllm if find_spec("vllm") else [])])
    return context


class Run:
    """One process of a run."""

    def __init__(self, context: ForkServerContext, arguments: dict[str, Any]):
        self.events, child_end = context.Pipe(duplex=False)
        given = {"arguments": arguments | {"events": child_end}}
        self.process: BaseProcess = context.Process(target=runpy.run_path, args=(str(SCRIPT), given))
        self.process.start()
        child_end.close()

    def wait_for(self, what: str, step: int) -> bool:
        """Whether the moment came, or one past it, before the run ended."""
        try:
            while True:
                told, at = self.events.recv()
                if at > step or (at == step and told == what):
                    return True
        except EOFError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self) -> None:
        self.wait_for("the end", STEPS + 1)
        self.process.join(120)
        assert self.process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("transformers", "two_iterations", marks=pytest.mark.xdist_group("vllm")),
        pytest.param("vllm", "two_minibatches", marks=VLLM_MARKS),
    ],
)
def test_killed_ten_times_equals_never_killed(
    tmp_path: Path, processes: ForkServerContext, engine: str, options: str
) -> None:
    model = str(tiny_checkpoint(tmp_path / "model"))

    def start(output: str, hold: int = STEPS + 1) -> Run:
        where = {"model": model, "output": str(tmp_path / output), "hold": hold}
        return Run(processes, where | {"engine": engine, "options": RUNS[options]})

    start("whole").finish()
    whole = checkpoints(tmp_path / "whole")[-1]
    assert whole.name == f"checkpoint-{STEPS}" and len(read_log(whole)) >= STEPS // 2
    assert len(list((tmp_path / "whole" / "rollouts").iterdir())) == STEPS // 2

    rng, moments = random.Random(0), []
    for step in sorted(rng.sample(range(STEPS), KILLS)):
        what = rng.choice(MOMENTS)
        run = start("killed", hold=min(step + 2, STEPS))  # a killer that gets no time to come must not be too late
        assert run.wait_for(what, step), f"the run ended before step {step}"
        time.sleep(rng.uniform(0, LATEST))
        run.kill()
        assert run.process.exitcode == -signal.SIGKILL
        moments.append((what, step))
    assert not (tmp_path / "killed" / FINISHED).exists()
    assert {what for what, _ in moments} == set(MOMENTS)
    start("killed").finish()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
