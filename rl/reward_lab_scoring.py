"""Reward functions on completions that are there already: batches in, scores out, several at a time if asked for."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..rewards.calls import RewardBatch
from ..rewards.pool import PoolLimits
from ..rewards.runner import RewardRunner, RewardScores

Report = Callable[[int], None]  # called with the completions scored so far
LINE_SECONDS = 10.0  # between two lines of progress off a terminal
OUTPUT_FORMATS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Scoring:
    """Which functions, and how they are called.

    Attributes:
        functions: by TRL's contract.
        weights: of their sum; None: 1 each.
        workers: how many batches are scored at the same time, each in a worker process with the limits below; 0: one
            after the other in this process, without limits.
        timeout: wall-clock seconds of one call.
        memory_gib: of one worker.
    """

    functions: Sequence[Callable[..., Any]]
    weights: Sequence[float] | None = None
    workers: int = 1
    timeout: float = 60.0
    memory_gib: float = 4.0

    def runner(self) -> RewardRunner:
        """A runner that scores what fails as None. Raises ValueError for weights that do not fit, or bad limits."""
        limits = PoolLimits(1, self.timeout, self.memory_gib) if self.workers else None
        return RewardRunner(self.functions, self.weights, "none", limits, failure_share=1.0, async_timeout=self.timeout)


def score_batches(scoring: Scoring, batches: Sequence[RewardBatch], report: Report) -> list[RewardScores]:
    """The scores of each batch. A batch is one call of each function, so that `RewardScores.seconds` is a call's time.

    Raises:
        ValueError: a function requires a column that the batches lack.
    """
    return _score_in_workers(scoring, batches, report) if scoring.workers else _score_here(scoring, batches, report)


def _score_here(scoring: Scoring, batches: Sequence[RewardBatch], report: Report) -> list[RewardScores]:
    """On the main thread, which verifiers that use signals need."""
    runner, results, completions = scoring.runner(), [], 0
    try:
        for batch in batches:
            results.append(_score(runner, batch))
            completions += len(batch)
            report(completions)
    finally:
        runner.close()
    return results


def _score_in_workers(scoring: Scoring, batches: Sequence[RewardBatch], report: Report) -> list[RewardScores]:
    results: dict[int, RewardScores] = {}
    tasks: SimpleQueue[int] = SimpleQueue()
    answers: SimpleQueue[tuple[int, RewardScores | BaseException]] = SimpleQueue()
    for index in range(len(batches)):
        tasks.put(index)
    arguments = (scoring, batches, tasks, answers)
    count = min(scoring.workers, len(batches))
    # Daemons: a command that is interrupted does not wait for them.
    threads = [threading.Thread(target=_work, args=arguments, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    completions = 0
    while len(results) < len(batches):
        index, scores = answers.get()
        if isinstance(scores, BaseException):
            raise scores
        results[index] = scores
        completions += len(scores.values)
        report(completions)
    for thread in threads:
        thread.join()
    return [results[index] for index in range(len(batches))]


def _score(runner: RewardRunner, batch: RewardBatch) -> RewardScores:
    return runner.score(batch.prompts, batch.completions, batch.completion_ids, batch.columns, batch.trainer_state)


def _work(
    scoring: Scoring,
    batches: Sequence[RewardBatch],
    tasks: "SimpleQueue[int]",
    answers: "SimpleQueue[tuple[int, RewardScores | BaseException]]",
) -> None:
    """What one thread does, with a runner and so a worker process of its own: the times of calls do not mix."""
    runner = scoring.runner()
    try:
        while True:
            index = tasks.get_nowait()
            try:
                answers.put((index, _score(runner, batches[index])))
            except BaseException as error:  # raised again by the thread that waits
                answers.put((index, error))
                return
    except Empty:
        return
    finally:
        runner.close()


@contextmanager
def progress(total: int) -> Iterator[Report]:
    """Shows on standard error how many of `total` completions are scored: a bar, or off a terminal a line at times."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("scoring"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"scored {done} of {total} completions", file=sys.stderr, flush=True)

    yield line


def check_output(path: Path | None, data: str | None = None) -> None:
    """Raise ValueError where `write_table` would not write to `path`, or over `data`: before anything is scored."""
    if path is None:
        return
    if path.suffix not in OUTPUT_FORMATS:
        raise ValueError(
            f"--output {path}: files of type {path.suffix or 'none'} are not written: use .parquet, .jsonl"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: there is no directory {path.absolute().parent}")
    if data is not None and path.resolve() == Path(data).expanduser().resolve():
        raise ValueError(f"--output {path}: it is the file of --data, which would be lost: name another")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a .parquet or .jsonl file."""
    from datasets import Dataset

    table = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(str(path))
    else:
        table.to_json(str(path), force_ascii=False)
