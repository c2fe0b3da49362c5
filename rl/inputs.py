"""What a run names, opened and checked without loading weights: dataset, reward functions, model, output directory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import LoraConfig

from ..rewards.calls import ENVIRONMENTS
from ..rewards.loading import load_named, load_reward
from ..rewards.runner import RewardRunner
from ..weightshare.loading import read_config, shard_files
from .agents import Agents
from .checkpoint import resolve_resume
from .config import GRPOConfig
from .dataset_files import open_dataset
from .families import check_family
from .run_config import RunConfig
from .setup import check_model, load_tokenizer, model_config, stop_token_ids


def open_datasets(run: RunConfig) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The datasets to train and to evaluate on; the latter None where the run names none."""
    train = open_dataset(run.dataset, run.dataset_config, run.dataset_split)
    if run.eval_dataset is None and run.eval_dataset_split is None:
        return train, None
    config = run.dataset_config if run.eval_dataset in (None, run.dataset) else None
    return train, open_dataset(run.eval_dataset or run.dataset, config, run.eval_dataset_split or "train")


@dataclass(frozen=True)
class Inputs:
    """What a run names, opened. `findings` has one line for each thing that was found to be in order."""

    reward_funcs: list[Callable[..., Any]]
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | None
    lora: LoraConfig
    findings: list[str]
    agents: dict[str, Any]


def open_inputs(run: RunConfig, config: GRPOConfig) -> Inputs:
    """Open what a run names and check it, as far as it goes without loading weights.

    Raises:
        ValueError: the first thing that is not in order.
    """
    findings = [_check_output(run, config)]
    rewards = [load_reward(spec) for spec in run.reward_funcs]
    weights = config.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(f"reward_weights has {len(weights)} entries, reward_funcs {len(rewards)}: give one for each")
    findings.append(f"reward functions: {', '.join(run.reward_funcs) or 'those of the environment'}")
    agents = agent_arguments(run)
    findings += [f"{name}: {getattr(run, name)}" for name in agents]
    train, evaluation = open_datasets(run)
    findings.append(f"dataset: {_describe(train)}")
    if evaluation is not None:
        findings.append(f"evaluation dataset: {_describe(evaluation)}")
    elif config.eval_strategy != "no":
        raise ValueError("eval_strategy is set, but there is no eval_dataset and no eval_dataset_split: name one")
    _check_rewards(rewards, train, agents)
    findings.append(_check_model(run))
    _check_tools(run, config, agents)
    lora = run.lora_config()
    check_model(run.model, lora, config.base)
    findings.append(f"LoRA: r {lora.r}, lora_alpha {lora.lora_alpha}, target_modules {lora.target_modules}")
    return Inputs(rewards, train, evaluation, lora, findings, agents)


def agent_arguments(run: RunConfig) -> dict[str, Any]:
    """Those of GRPOTrainer's arguments for tools and environments that a run names, loaded.

    Raises ValueError, by the name, for what cannot be loaded.
    """
    loaded: dict[str, Any] = {}
    if run.tools:
        loaded["tools"] = [load_named(spec, "tool") for spec in run.tools]
    if run.environment_factory is not None:
        loaded["environment_factory"] = load_named(run.environment_factory, "environment_factory")
    if run.rollout_func is not None:
        loaded["rollout_func"] = load_named(run.rollout_func, "rollout_func")
    return loaded


def _check_rewards(rewards: list[Callable[..., Any]], train: Dataset | IterableDataset, agents: dict[str, Any]) -> None:
    """Raise ValueError for a function that cannot be called, or that asks for a column which there is not."""
    if not rewards:
        return
    try:
        runner = RewardRunner(rewards)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if isinstance(train, Dataset) and "rollout_func" not in agents:
        late = [ENVIRONMENTS] if "environment_factory" in agents else []
        runner.check_columns([*train.column_names, *late])


def _check_output(run: RunConfig, config: GRPOConfig) -> str:
    assert config.output_dir is not None  # GRPOConfig refuses None
    resume = config.resume_from_checkpoint if run.resume is None else run.resume
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ValueError(f"output_dir {config.output_dir} is a file: name a directory")
    start = resolve_resume(Path(config.output_dir), resume)
    return f"output directory: {config.output_dir}, " + (f"going on from {start.name}" if start else "a new run")


def _check_model(run: RunConfig) -> str:
    directory = Path(run.model).expanduser()
    if directory.is_dir():
        check_family(read_config(directory).get("model_type"))
        shard_files(directory)
    elif directory.is_absolute() or run.model.startswith((".", "~")):
        raise ValueError(f"model {run.model!r}: there is no such directory")
    try:
        config = model_config(run.model)
    except OSError as error:
        raise ValueError(
            f"model {run.model!r}: no such directory, and no model of the hub that can be reached"
        ) from error
    check_family(config.model_type)
    tokenizer = load_tokenizer(run.model)
    stop_token_ids(run.model, tokenizer)
    return f"model: {run.model} ({config.model_type}), vocabulary of {len(tokenizer)} tokens"


def _check_tools(run: RunConfig, config: GRPOConfig, agents: dict[str, Any]) -> None:
    """Raise ValueError for tools that cannot be described, or for a chat template that has no use for them."""
    if "tools" in agents:
        tokenizer = load_tokenizer(run.model)
        stops = stop_token_ids(run.model, tokenizer)
        # Without the environments: to make one may cost a sandbox.
        Agents.of(agents["tools"], None, tokenizer, stops, config, agents.get("rollout_func"))


def _describe(dataset: Dataset | IterableDataset) -> str:
    rows = f"{len(dataset)} rows" if isinstance(dataset, Dataset) else "a stream"
    return f"{rows}, columns {', '.join(dataset.column_names or ['not known yet'])}"
