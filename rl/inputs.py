"""What a run names, opened and checked without loading weights: dataset, reward functions, model, output directory."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig

from ..rewards.loading import load_reward
from ..weightshare.loading import read_config, shard_files
from .checkpoint import resolve_resume
from .config import GRPOConfig
from .families import check_family
from .run_config import RunConfig
from .setup import load_tokenizer, model_config, stop_token_ids

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def open_dataset(name: str, config: str | None = None, split: str = "train") -> Dataset | IterableDataset:
    """Open a dataset for training.

    Args:
        name: a file (.jsonl, .json, .csv, .parquet), a directory of `save_to_disk`, a hub id, or `path.py:function`.
        config: of a dataset on the hub.
        split: of it; for files and the hub also a slice such as `train[:1000]`.

    Raises:
        ValueError: nothing of the kind is there, it cannot be read, or it has no rows or no `prompt` column.
    """
    try:
        dataset = _open(name, config, split)
    except (OSError, ValueError, HFValidationError) as error:
        raise ValueError(f"dataset {name!r}: {str(error) or type(error).__name__}") from error
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"dataset {name!r}, split {split!r}: it is empty")
    columns = dataset.column_names or []  # a stream may not know them before it is read
    if columns and "prompt" not in columns:
        raise ValueError(f"dataset {name!r} has no `prompt` column, only {', '.join(columns)}: rename or add one")
    return dataset


def _open(name: str, config: str | None, split: str) -> Dataset | IterableDataset:
    source, _, function = name.rpartition(":")
    if source.endswith(".py"):
        if split != "train":
            raise ValueError(f"a function gives one dataset, so split {split!r} cannot be taken: name another function")
        return _call(Path(source).expanduser(), function)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"files of type {path.suffix or 'none'} cannot be read: use {', '.join(FILE_FORMATS)}")
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            saved = load_from_disk(str(path))
        except IndexError as error:  # datasets cannot read what it wrote of a dataset without rows
            raise ValueError("it is empty") from error
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"there is no split {split!r}, only {', '.join(saved)}")
            return saved[split]
        if split != "train":
            raise ValueError(f"the directory is one dataset without splits, so split {split!r} cannot be taken")
        return saved
    if not path.exists() and (path.suffix in FILE_FORMATS or path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"there is no such file or directory (looked in {path.parent.resolve()})")
    return load_dataset(name, config, split=split)


def _call(path: Path, function: str) -> Dataset | IterableDataset:
    """What `function` of the Python file returns."""
    if not path.is_file():
        raise ValueError(f"there is no file {path.name} in {path.parent.resolve()}")
    spec = importlib.util.spec_from_file_location(f"colora_dataset_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        dataset = make() if callable(make) else None
    except Exception as error:  # the user's code may raise anything; it is told whose it is
        raise ValueError(f"running it raised {type(error).__name__}: {error}") from error
    if not callable(make):
        raise ValueError(f"{path} has no function {function!r}")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"{function} returned a {type(dataset).__name__}, not a datasets.Dataset")
    return dataset


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
    findings.append(f"reward functions: {', '.join(run.reward_funcs)}")
    train, evaluation = open_datasets(run)
    findings.append(f"dataset: {_describe(train)}")
    if evaluation is not None:
        findings.append(f"evaluation dataset: {_describe(evaluation)}")
    elif config.eval_strategy != "no":
        raise ValueError("eval_strategy is set, but there is no eval_dataset and no eval_dataset_split: name one")
    findings.append(_check_model(run))
    lora = run.lora_config()
    findings.append(f"LoRA: r {lora.r}, lora_alpha {lora.lora_alpha}, target_modules {lora.target_modules}")
    return Inputs(rewards, train, evaluation, lora, findings)


def _check_output(run: RunConfig, config: GRPOConfig) -> str:
    assert config.output_dir is not None  # GRPOConfig refuses None
    resume = config.resume_from_checkpoint if run.resume is None else run.resume
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


def _describe(dataset: Dataset | IterableDataset) -> str:
    rows = f"{len(dataset)} rows" if isinstance(dataset, Dataset) else "a stream"
    return f"{rows}, columns {', '.join(dataset.column_names or ['not known yet'])}"
