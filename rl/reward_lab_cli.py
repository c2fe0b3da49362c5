"""`colora rewards run` and `colora rewards replay` on the command line. Heavy imports stand inside the functions."""

import argparse
import logging
from pathlib import Path
from typing import Any

FAILED = 1


def add_rewards_command(commands: Any) -> None:
    """Add `rewards` and its two commands to argparse's subparsers."""
    parser = commands.add_parser("rewards", help="try reward functions on a file, or on the rollouts of a past run")
    actions = parser.add_subparsers(dest="rewards_command", metavar="COMMAND", required=True)
    run = actions.add_parser(
        "run",
        help="score a file of completions and show values, times, failures and ties",
        description="Score a file of completions, without a GPU, and show how the rewards are distributed, how long a "
        "call takes, what failed, and how many groups would train nothing because their rewards are equal. A call gets "
        "the completions of one prompt. Exit code 0; 1: a function failed on some completion; 2: an error.",
    )
    run.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="a .jsonl, .json, .csv or .parquet file (or another form of `dataset`) with a column `completion` (a "
        "text, messages, or a list of such); usually `prompt`; the other columns go to the function",
    )
    _add_scoring(run)
    run.add_argument("--limit", type=_count, metavar="N", help="only the first N rows")
    run.add_argument("--group-by", metavar="COLUMN", help="what the completions of a group share (default: the prompt)")
    run.add_argument("--tokenizer", metavar="MODEL", help="make the completion_ids that the file lacks")

    replay = actions.add_parser(
        "replay",
        help="score the rollouts of a run with a new function and show what would have changed",
        description="Score the rollouts of a past run with a new reward function and show what would have changed: "
        "rewards, signs of advantages, groups with a signal, the completions that the two disagree on most. Nothing is "
        "written into the run. Exit code 0; 1: a function failed on some completion; 2: an error.",
    )
    replay.add_argument("run", type=Path, metavar="RUN", help="the output_dir of the run")
    _add_scoring(replay)
    replay.add_argument(
        "--against",
        metavar="NAME",
        help="which recorded reward the new one replaces (default: all of the run's functions together)",
    )
    replay.add_argument("--steps", type=_steps, default=(None, None), metavar="A:B", help="only steps A to B, included")
    replay.add_argument(
        "--data",
        metavar="FILE",
        help="where the other columns come from, by prompt (default: the dataset that the run names)",
    )
    replay.add_argument(
        "--examples", type=_count_or_none, default=3, metavar="N", help="how many disagreements to show (default: 3)"
    )


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    """What both commands take."""
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="FUNCTION",
        help="`path/to/file.py:function` or `package.module:function`; give it again for more",
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of several functions, in their order (default: 1 each)"
    )
    parser.add_argument(
        "--workers",
        type=_count_or_none,
        default=1,
        metavar="N",
        help="calls at a time, each in a process that is killed when it hangs (default: 1); 0: in this process",
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds of a call (default: 60)")
    parser.add_argument("--memory-gib", type=float, default=4.0, metavar="GIB", help="of a worker (default: 4)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scored rows, .parquet or .jsonl")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")


def rewards_command(arguments: argparse.Namespace) -> int:
    """Run either command and print its report. Returns 0, or 1 where a function failed on a completion."""
    import datasets

    from ..rewards.loading import load_reward
    from .reward_lab_scoring import Scoring

    datasets.disable_progress_bars()  # of reading a file: this command has a bar of its own
    logging.getLogger("colora.rewards.runner").setLevel(logging.ERROR)  # each failure is in the report, with its count
    functions = [load_reward(spec) for spec in arguments.reward]
    scoring = Scoring(functions, arguments.weights, arguments.workers, arguments.timeout, arguments.memory_gib)
    if arguments.rewards_command == "run":
        from .reward_lab import run_lab

        text, failures = run_lab(
            scoring, arguments.data, arguments.limit, arguments.group_by, arguments.tokenizer, arguments.output
        )
    else:
        from .reward_replay import replay_rewards

        text, failures = replay_rewards(
            scoring,
            arguments.run,
            arguments.against,
            arguments.steps,
            arguments.data,
            arguments.examples,
            arguments.output,
        )
    print(text)
    return FAILED if failures else 0


def _count(text: str) -> int:
    return _whole(text, least=1)


def _count_or_none(text: str) -> int:
    return _whole(text, least=0)


def _whole(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _steps(text: str) -> tuple[int | None, int | None]:
    """`A:B`, `A:`, `:B` or `A`."""
    first, colon, last = text.partition(":")
    parts = [first, last if colon else first]
    if not any(parts) or not all(part.isdigit() or not part for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B, A: or :B")
    begin, end = (int(part) if part else None for part in parts)
    if begin is not None and end is not None and begin > end:
        raise argparse.ArgumentTypeError(f"{text!r}: the first step is after the last")
    return begin, end
