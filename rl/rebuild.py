"""A run's configuration in its output directory, and the trainer that is made from it again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..rewards.loading import load_reward
from ..rollout.records import read_records
from .checkpoint import ROLLOUTS, RUN_FILE, write_durably
from .config import GRPOConfig
from .inputs import agent_arguments, open_datasets
from .resolved import resolved_yaml
from .run_config import RunConfig, read_run_config
from .trainer import GRPOTrainer


class RunFile(TrainerCallback):
    """Writes what a run is to RUN_FILE when it begins, or goes on: a resume that is refused changes nothing there."""

    def __init__(self, run: RunConfig, config: GRPOConfig):
        self.text = located_yaml(run, config)

    def on_train_begin(self, args: TrainingArguments, *_: Any, **state: Any) -> None:
        write_durably(Path(str(args.output_dir)) / RUN_FILE, self.text)


def located_yaml(run: RunConfig, config: GRPOConfig) -> str:
    """`resolved_yaml` for RUN_FILE: paths are absolute, so that it gives the same run from anywhere."""
    located = replace(
        run,
        model=_absolute(run.model),
        dataset=_absolute(run.dataset),
        eval_dataset=None if run.eval_dataset is None else _absolute(run.eval_dataset),
        reward_funcs=[_absolute(spec) for spec in run.reward_funcs],
        tools=None if run.tools is None else [_absolute(spec) for spec in run.tools],
        environment_factory=None if run.environment_factory is None else _absolute(run.environment_factory),
        rollout_func=None if run.rollout_func is None else _absolute(run.rollout_func),
        resume=None,
    )
    return resolved_yaml(located, config)


def _absolute(name: str) -> str:
    """A path, or `path:function`, as an absolute one; hub ids and modules as they are."""
    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    source, colon, function = name.rpartition(":")
    path = Path(source).expanduser()
    return f"{path.resolve()}:{function}" if colon and path.is_file() else name


def rebuild_trainer(directory: Path, rewards: bool = True) -> tuple[GRPOTrainer, str | None]:
    """A trainer as the one of the run in `directory`, with the adapter that the seed gives.

    Args:
        directory: the output directory of a run of `colora train`; it may have been moved.
        rewards: load the reward functions. Otherwise, and where they cannot be loaded, they are stood in for.

    Returns:
        The trainer, and why its reward functions cannot be called, or None where they can.

    Raises:
        ValueError: there is no run, or none that was started by `colora train`; or the model or the dataset is not
            there any more.
    """
    file = directory / RUN_FILE
    if not file.is_file():
        if not (directory / ROLLOUTS).is_dir():
            raise ValueError(f"there is no run in {directory}: it has neither {RUN_FILE} nor {ROLLOUTS}/")
        raise ValueError(
            f"{directory} has no {RUN_FILE}: the run was started from Python, where the model, the data and the reward "
            "functions are objects. Make the same GRPOTrainer again and call colora.rl.replay.replay(trainer, step)"
        )
    run = read_run_config(file, [("output_dir", str(directory)), ("report_to", "none"), ("disable_tqdm", "true")])
    functions, missing = _load_rewards(run) if rewards else (None, "it was asked to leave them out")
    functions = functions or [_stand_in(name) for name in _reward_names(directory, len(run.reward_funcs))]
    train, evaluation = open_datasets(run)
    config, lora, agents = run.grpo_config(), run.lora_config(), agent_arguments(run)
    trainer = GRPOTrainer(run.model, functions, config, train, evaluation, peft_config=lora, **agents)
    return trainer, missing


def _load_rewards(run: RunConfig) -> tuple[list[Callable[..., Any]] | None, str | None]:
    """The reward functions, or why there are none."""
    try:
        return [load_reward(spec) for spec in run.reward_funcs], None
    except ValueError as error:
        return None, str(error)


def _reward_names(directory: Path, count: int) -> list[str]:
    """What the rollouts call the reward functions, whose rewards stand before those that options add."""
    for path in sorted((directory / ROLLOUTS).glob("step_*.parquet")):
        for record in read_records(path):
            return list(record.rewards)[:count]
    raise ValueError(f"{directory} has no rollouts: there is no step to replay")


def _stand_in(name: str) -> Callable[..., Any]:
    """A function with the name of a reward function, which is not to be called."""

    def absent(**columns: Any) -> list[float]:
        raise RuntimeError(f"reward function {name!r} was not loaded")

    absent.__name__ = name
    return absent
