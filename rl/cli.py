"""The `colora` command. Heavy imports stand inside the commands, so that `colora --help` answers at once."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from .reward_lab_cli import add_rewards_command, rewards_command

if TYPE_CHECKING:
    from .config import GRPOConfig
    from .run_config import RunConfig

DIFFERENT = 1
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0, 1 for a replay with differences or a reward function that failed, 2 for an error of the
    user's, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `train` takes any option of the configuration, which argparse cannot know before the heavy imports.
    if arguments[:1] == ["train"]:
        debug = "--debug" in arguments
        given = [argument for argument in arguments[1:] if argument != "--debug"]
        return _guarded(
            lambda: _train(given), debug, hint="; `colora train --resume true` goes on from the last checkpoint"
        )
    parsed = _parser().parse_args(arguments)
    if parsed.command == "env":
        return _env()
    if parsed.command == "replay":
        return _guarded(lambda: _replay(parsed), parsed.debug)
    if parsed.command == "rewards":
        return _guarded(lambda: rewards_command(parsed), parsed.debug)
    _parser().print_help(sys.stderr)
    return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colora", description="GRPO of language models on one GPU, by reward functions written in Python."
    )
    parser.add_argument("--version", action="version", version=f"colora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "train", help="train a LoRA adapter as a YAML file says; `colora train --help` lists the options"
    )
    commands.add_parser("env", help="show versions, the GPU, and which engine and kernels would be used")
    replay = commands.add_parser(
        "replay",
        help="do a past step of a run again and print what differs from what was recorded",
        description="Do a past step of a run of `colora train` again, from its recorded rollouts and the checkpoint "
        "before it, and print what differs. Nothing is written. Exit code 0: no differences, 1: some, 2: an error.",
    )
    replay.add_argument("run", type=Path, metavar="RUN", help="the output_dir of the run")
    replay.add_argument("--step", type=int, required=True, metavar="K", help="which optimizer step, from 1")
    replay.add_argument("--no-rewards", action="store_true", help="do not call the reward functions again")
    replay.add_argument("--generate", action="store_true", help="let the engine sample the rollouts again too")
    replay.add_argument(
        "--tolerance",
        type=_share,
        default=0.0,
        metavar="X",
        help="relative difference that does not count (default: 0)",
    )
    replay.add_argument("--debug", action="store_true", help="show where an error was raised")
    add_rewards_command(commands)
    return parser


def _share(text: str) -> float:
    """A relative difference: with NaN nothing would count, and be reported as the same."""
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up to, but not, 1")
    return share


def _env() -> int:
    from .environment import describe_environment

    print(describe_environment())
    return 0


def _guarded(command: Callable[[], int], debug: bool, hint: str = "") -> int:
    """`command`, with errors of the user's as one line. `hint` follows where it is interrupted."""
    from ..rewards.runner import RewardError
    from ..rollout.toolkit import EnvironmentFailure
    from ..weightshare.guard import ParityError
    from ..weightshare.vllm_names import VLLMUnusable

    of_functions = (RewardError, EnvironmentFailure)  # of the user's, whose own errors are their causes
    try:
        return command()
    except KeyboardInterrupt:
        print(f"interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, *of_functions, ParityError, VLLMUnusable, FloatingPointError) as error:
        cause = error.__cause__ if isinstance(error, of_functions) else None
        if debug:
            traceback.print_exc()
        elif cause is not None and (cause.__traceback__ or hasattr(cause, "__notes__")):
            traceback.print_exception(cause)  # what the user's function raised, here or (a note) in a worker: where
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _train(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        from .option_help import train_help

        print(train_help())
        return 0
    dry_run = "--dry-run" in arguments
    path, overrides = split_arguments([argument for argument in arguments if argument != "--dry-run"])

    from .run_config import read_run_config

    run = read_run_config(path, overrides)
    config = run.grpo_config()
    return _dry_run(run, config) if dry_run else _run(run, config)


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[tuple[str, str]]]:
    """`[CONFIG.yaml] [--name value | --name=value | --flag ...]` as (path or None, [(name, text), ...]).

    A name without a value is a flag and reads "true"; dashes in names are underscores.

    Raises ValueError for a second file.
    """
    path: Path | None = None
    overrides: list[tuple[str, str]] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument.startswith("--"):
            name, equals, text = argument.removeprefix("--").partition("=")
            if not equals:
                text = remaining.pop(0) if remaining and not remaining[0].startswith("--") else "true"
            overrides.append((name.replace("-", "_"), text))
        elif path is None:
            path = Path(argument).expanduser()
        else:
            raise ValueError(f"{argument!r}: there is a configuration file already, {path}; options begin with --")
    return path, overrides


def _dry_run(run: "RunConfig", config: "GRPOConfig") -> int:
    from .inputs import open_inputs
    from .resolved import resolved_yaml
    from .setup import check_engine, choose_engine

    print(resolved_yaml(run, config), end="")
    for finding in open_inputs(run, config).findings:
        print(f"# checked: {finding}")
    check_engine(config)
    print(f"# checked: engine: {choose_engine(config.engine, config.device)}")
    print("# not checked without the weights: the number and length of prompts, memory")
    return 0


def _run(run: "RunConfig", config: "GRPOConfig") -> int:
    from .inputs import open_inputs
    from .rebuild import RunFile
    from .trainer import GRPOTrainer

    inputs = open_inputs(run, config)
    description = RunFile(run, config)  # makes a GRPOConfig, which must not come after the trainer's
    trainer = GRPOTrainer(
        model=run.model,
        reward_funcs=inputs.reward_funcs,
        args=config,
        train_dataset=inputs.train_dataset,
        eval_dataset=inputs.eval_dataset,
        callbacks=[description],
        peft_config=inputs.lora,
        **inputs.agents,
    )
    try:
        trainer.train(resume_from_checkpoint=run.resume)
    finally:
        trainer.progress.close()
    trainer.save_model()
    trainer.engine.close()
    print(f"the adapter is in {config.output_dir}")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from .rebuild import rebuild_trainer
    from .replay import replay

    trainer, no_rewards = rebuild_trainer(arguments.run, rewards=not arguments.no_rewards)
    print(f"step {arguments.step} of {arguments.run}")
    found = replay(
        trainer, arguments.step, no_rewards=no_rewards, generate=arguments.generate, tolerance=arguments.tolerance
    )
    trainer.engine.close()
    for finding in found:
        print(f"  {finding}")
    differences = sum(finding.status == "different" for finding in found)
    print(f"{differences or 'no'} difference{'' if differences == 1 else 's'}")
    return DIFFERENT if differences else 0


if __name__ == "__main__":
    sys.exit(main())
