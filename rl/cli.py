"""The `colora` command. Heavy imports stand inside the commands, so that `colora --help` answers at once."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__

if TYPE_CHECKING:
    from .config import GRPOConfig
    from .run_config import RunConfig

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `train` takes any option of the configuration, which argparse cannot know before the heavy imports.
    if arguments[:1] == ["train"]:
        return _guarded_train(arguments[1:])
    if _parser().parse_args(arguments).command == "env":
        return _env()
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
    return parser


def _env() -> int:
    from .environment import describe_environment

    print(describe_environment())
    return 0


def _guarded_train(arguments: list[str]) -> int:
    """`_train`, with errors of the user's as one line."""
    from ..rewards.runner import RewardError
    from ..weightshare.guard import ParityError

    try:
        return _train([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        print("interrupted; `--resume true` goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RewardError, ParityError, FloatingPointError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
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

    print(resolved_yaml(run, config), end="")
    for finding in open_inputs(run, config).findings:
        print(f"# checked: {finding}")
    print("# not checked without the weights: LoRA targets, the length of prompts, memory")
    return 0


def _run(run: "RunConfig", config: "GRPOConfig") -> int:
    from .inputs import open_inputs
    from .trainer import GRPOTrainer

    inputs = open_inputs(run, config)
    trainer = GRPOTrainer(
        model=run.model,
        reward_funcs=inputs.reward_funcs,
        args=config,
        train_dataset=inputs.train_dataset,
        eval_dataset=inputs.eval_dataset,
        peft_config=inputs.lora,
    )
    try:
        trainer.train(resume_from_checkpoint=run.resume)
    finally:
        trainer.progress.close()
    trainer.save_model()
    trainer.engine.close()
    print(f"the adapter is in {config.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
