"""What a run shows while it goes: a bar on a terminal, one line a log elsewhere."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..rollout.records import RolloutRecord

Clock = Callable[[], float]
BAR_WIDTH = 24  # characters


class ProgressBar(TrainerCallback):
    """Steps done, reward, completion length, tokens/s, time gone and time left.

    On a terminal it is one bar for the run and, within a step, one for its phase; elsewhere each log is one plain line.

    Args:
        console: where to write; by default standard output.
        clock: seconds, for tests.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic):
        self.console = console or Console()
        self._clock = clock
        self._bar: Progress | None = None
        self._run_task: TaskID | None = None
        self._phase_task: TaskID | None = None
        self._started, self._first_step, self._step, self._total = 0.0, 0, 0, 0
        self._status = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        self._started, self._first_step = self._clock(), state.global_step  # not 0 where a run goes on
        self._step, self._total, self._status = state.global_step, state.max_steps, ""
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(BAR_WIDTH),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            self._run_task = self._bar.add_task("step", total=self._total, completed=self._step, status="")
            self._bar.start()

    def phase(self, name: str, done: int, total: int) -> None:
        """Show how far a part of the step is: `phase("generating", 23, 64)`. Does nothing where no bar is shown."""
        if self._bar is None:
            return
        if self._phase_task is None:
            self._phase_task = self._bar.add_task(name, total=total, completed=done, status="")
        else:
            self._bar.update(self._phase_task, description=name, total=total, completed=done)
        self._show_times()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step
        if self._bar is not None and self._phase_task is not None:
            self._bar.remove_task(self._phase_task)
            self._phase_task = None
        self._show_times()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:  # transformers' summary, after the last step
            self._print(f"trained {self._step} steps in {duration(logs['train_runtime'])}")
        elif any(name.startswith("eval_") for name in logs):
            self._print(f"{self._position()}  evaluation: {describe(_without_prefix(logs))}")
        else:
            self._status = describe(logs)
            if self._bar is None:
                self._print("  ".join([self._position(), self._status, *self._times()]))
            self._show_times()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down and give the terminal back; harmless where there is none."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._run_task = self._phase_task = None

    def warn(self, step: int, text: str) -> None:
        """Print what a run should be looked at for, as a line of its own."""
        self._print(f"step {step}/{self._total}  warning: {text}")

    def show_completions(self, records: Sequence[RolloutRecord], step: int, limit: int | None = None) -> None:
        """Print a table of prompts, completions, rewards and advantages.

        Args:
            records: of one generation.
            step: the optimizer step they were made for.
            limit: how many to print; None: all.
        """
        shown = records[:limit]
        if not shown:
            return
        table = Table(title=f"step {step}: {len(shown)} of {len(records)} completions", show_lines=True)
        for column in ("prompt", "completion", *shown[0].rewards, "advantage"):
            table.add_column(column)
        for record in shown:
            rewards = ["none" if value is None else f"{value:.3g}" for value in record.rewards.values()]
            cells = [_as_text(record.prompt), _as_text(record.completion), *rewards, f"{record.advantage:+.2f}"]
            table.add_row(*map(Text, cells))  # Text, since a str would have its [brackets] read as markup
        self.console.print(table)

    def _print(self, line: str) -> None:
        # Plain and unwrapped: a line of a log file is one line.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _position(self) -> str:
        return f"step {self._step}/{self._total}"

    def _times(self) -> list[str]:
        """Time gone and, after a first step, time left at the pace of this session."""
        elapsed, done = self._clock() - self._started, self._step - self._first_step
        left = [f"left {duration(elapsed / done * (self._total - self._step))}"] if done > 0 else []
        return [f"elapsed {duration(elapsed)}", *left]

    def _show_times(self) -> None:
        if self._bar is not None and self._run_task is not None:
            status = "  ".join(part for part in (self._status, *self._times()) if part)
            self._bar.update(self._run_task, completed=self._step, status=status)


def describe(logs: dict[str, Any]) -> str:
    """The metrics of a log that fit on a line; those it lacks are left out."""
    parts = []
    if "reward" in logs:
        parts.append(f"reward {logs['reward']:.3f}")
    if "completions/mean_length" in logs:
        parts.append(f"length {logs['completions/mean_length']:.0f}")
    speeds = {"rollout": "throughput/rollout_tokens_per_s", "train": "throughput/train_tokens_per_s"}
    rates = [f"{what} {_short(logs[name])}" for what, name in speeds.items() if name in logs]
    if rates:
        parts.append(f"tokens/s: {', '.join(rates)}")
    if "step_time" in logs:
        parts.append(f"{logs['step_time']:.1f} s/step")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`3:25:07`, or `25:07` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(number: float) -> str:
    """Three digits or so: 954, 9.5k, 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _without_prefix(logs: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in logs.items()}


def _as_text(conversation: Any) -> str:
    """A prompt or completion as text: of messages the last one's content."""
    if isinstance(conversation, str):
        return conversation
    return str(conversation[-1].get("content") or "") if conversation else ""
