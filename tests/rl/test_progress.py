import io
import re

from colora.rl.progress import ProgressBar, describe, duration
from colora.rollout.records import RolloutRecord
from colora.rollout.trajectory import Segment, Trajectory
from rich.console import Console
from transformers import TrainerControl, TrainerState

LOGS = {
    "reward": 0.51234,
    "completions/mean_length": 231.4,
    "throughput/rollout_tokens_per_s": 954.2,
    "throughput/train_tokens_per_s": 9512.0,
    "step_time": 12.34,
}


class Run:
    """Calls a bar as transformers' Trainer does, on a clock of its own."""

    def __init__(self, terminal: bool, steps: int = 10, first_step: int = 0):
        self.output, self.now = io.StringIO(), 100.0
        console = Console(file=self.output, force_terminal=terminal, width=160, color_system=None)
        self.bar = ProgressBar(console, clock=lambda: self.now)
        self.state = TrainerState(max_steps=steps, global_step=first_step)
        self.call("on_train_begin")

    def call(self, event: str, **kwargs):
        getattr(self.bar, event)(None, self.state, TrainerControl(), **kwargs)

    def step(self, seconds: float, logs: dict | None = None):
        self.now += seconds
        self.state.global_step += 1
        self.call("on_step_end")
        if logs is not None:
            self.call("on_log", logs=logs)

    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output.getvalue())


def test_off_a_terminal_each_log_is_one_plain_line():
    run = Run(terminal=False)
    run.bar.phase("generating", 3, 64)
    run.step(60, LOGS)
    run.step(60, LOGS)
    assert run.output.getvalue().splitlines() == [
        "step 1/10  reward 0.512  length 231  tokens/s: rollout 954, train 9.5k  12.3 s/step  elapsed 1:00  left 9:00",
        "step 2/10  reward 0.512  length 231  tokens/s: rollout 954, train 9.5k  12.3 s/step  elapsed 2:00  left 8:00",
    ]


def test_time_left_counts_from_where_a_run_went_on():
    run = Run(terminal=False, steps=10, first_step=8)
    run.step(30, LOGS)
    assert "step 9/10" in run.text() and "left 0:30" in run.text()


def test_evaluations_and_the_end_have_lines_of_their_own():
    run = Run(terminal=False)
    run.step(5, LOGS)
    run.call("on_log", logs={"eval_reward": 0.75, "eval_completions/mean_length": 12.0, "eval_runtime": 1.0})
    run.call("on_log", logs={"train_runtime": 3725.0, "train_loss": 0.0})
    assert run.text().splitlines()[1:] == [
        "step 1/10  evaluation: reward 0.750  length 12",
        "trained 1 steps in 1:02:05",
    ]


def test_on_a_terminal_the_bar_shows_step_reward_phase_and_time_left():
    run = Run(terminal=True)
    run.step(60, LOGS)
    run.bar.phase("generating", 23, 64)
    run.bar.close()
    text = run.text()
    for part in ("1/10", "reward 0.512", "length 231", "left 9:00", "generating", "23/64"):
        assert part in text
    assert run.output.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_phase_ends_with_its_step():
    run = Run(terminal=True)
    run.bar.phase("training", 1, 2)
    run.step(1)
    assert [task.description for task in run.bar._bar.tasks] == ["step"]
    run.call("on_train_end")
    run.bar.phase("generating", 1, 2)  # an evaluation outside a run
    run.bar.close()


def test_a_log_without_some_metrics_is_described_by_the_others():
    assert describe({"loss": 0.1, "step_time": 2.0}) == "2.0 s/step"
    assert describe({}) == ""


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]


def record(prompt, completion, reward):
    trajectory = Trajectory("0", (1,), [Segment("model", (2,), (-0.5,))], "stop", 0)
    return RolloutRecord(
        step=0, prompt_index=0, sample=0, trajectory=trajectory, prompt=prompt, completion=completion,
        rewards={"right": reward}, reward=reward, advantage=-0.5, old_logprobs=None, extra={},
    )  # fmt: skip


def test_completions_are_printed_as_they_are():
    run = Run(terminal=False)
    chat = [{"role": "user", "content": "Sum?"}]
    records = [record("1+1=", "[bold]2[/bold]", 1.0), record(chat, [{"role": "assistant", "content": "3"}], None)]
    run.bar.show_completions(records, step=7)
    text = run.text()
    for part in ("step 7: 2 of 2 completions", "[bold]2[/bold]", "Sum?", "none", "-0.50", "right"):
        assert part in text


def test_num_completions_to_print_limits_the_table():
    run = Run(terminal=False)
    run.bar.show_completions([record("a", "first", 1.0), record("b", "second", 0.0)], step=0, limit=1)
    assert "first" in run.text() and "second" not in run.text()
    before = run.text()
    run.bar.show_completions([record("a", "first", 1.0)], step=0, limit=0)
    assert run.text() == before
