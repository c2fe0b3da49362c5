"""What a run's output directory holds of rewards: its rollouts, the options they were rated by, the dataset's rows."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..rollout.records import RolloutRecord, read_records, rollout_path
from .checkpoint import CONFIG_FILE, ROLLOUTS, RUN_FILE, checkpoints
from .config import GRPOConfig
from .dataset_files import open_rows

# The options that decide what becomes of rewards.
SETTINGS = (
    "advantage_estimator", "beta", "kl_in_reward", "max_completion_length", "multi_objective_aggregation",
    "overlong_buffer", "overlong_penalty", "reward_weights", "scale_rewards",
)  # fmt: skip


@dataclass(frozen=True)
class PastRun:
    """A run that `--data` or its own configuration has given the dataset's columns.

    Attributes:
        groups: the rollouts, each group's completions consecutive, by step.
        config: the options by which rewards became advantages; others are at their defaults.
        columns: of each group, what its completions' dataset row has besides the prompt.
        notes: what could not be found, and what was done instead.
    """

    groups: list[list[RolloutRecord]]
    config: GRPOConfig
    columns: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def read_past_run(directory: Path, steps: tuple[int | None, int | None], data: str | None) -> PastRun:
    """Read a run.

    Args:
        directory: its output directory.
        steps: the first and the last optimizer step whose rollouts count; None: the run's own.
        data: what holds the other columns, by prompt; None: the dataset that the run names.

    Raises:
        ValueError: there are no such rollouts, `data` cannot be opened or lacks a prompt of theirs.
    """
    groups = list(_groups(_read_rollouts(directory, *steps)))
    values, notes = _settings(directory)
    chosen = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    config = GRPOConfig(str(directory), device="cpu", **chosen)
    source = data or values.get("dataset")
    if source is None:
        notes.append("functions get no columns of the dataset, which the run does not name; --data names it")
        return PastRun(groups, config, [{} for _ in groups], notes)
    try:
        split = str(values.get("dataset_split") or "train") if data is None else "train"
        dataset = open_rows(source, values.get("dataset_config") if data is None else None, split)
    except ValueError as error:
        if data is not None:
            raise
        notes.append(f"functions get no columns of the dataset; --data names another: {error}")
        return PastRun(groups, config, [{} for _ in groups], notes)
    return PastRun(groups, config, list(_columns(groups, dataset, source)), notes)


def _read_rollouts(directory: Path, first: int | None, last: int | None) -> list[RolloutRecord]:
    folder = directory / ROLLOUTS
    found = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.parquet"))
    if not found:
        raise ValueError(f"there are no rollouts of a run in {directory}: {folder} has no step_*.parquet")
    chosen = [step for step in found if (first or 0) <= step and (last is None or step <= last)]
    if not chosen:
        raise ValueError(f"{directory} has rollouts of steps {found[0]} to {found[-1]}, none of those asked for")
    return [record for step in chosen for record in read_records(rollout_path(folder, step))]


def _groups(records: Iterable[RolloutRecord]) -> Iterator[list[RolloutRecord]]:
    """The completions of each prompt: a group begins where `sample` does not go on."""
    group: list[RolloutRecord] = []
    for record in records:
        if group and (record.sample <= group[-1].sample or record.step != group[-1].step):
            yield group
            group = []
        group.append(record)
    yield group


def _settings(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """The run's configuration, from the first of the files that hold it; and a note where none does."""
    if (directory / RUN_FILE).is_file():
        return yaml.safe_load((directory / RUN_FILE).read_text(encoding="utf-8")), []
    for place in (directory, *reversed(checkpoints(directory))):
        if (place / CONFIG_FILE).is_file():
            return json.loads((place / CONFIG_FILE).read_text(encoding="utf-8")), []
    note = f"{directory} has neither {RUN_FILE} nor {CONFIG_FILE}: advantages follow GRPOConfig's defaults"
    return {}, [note]


def _columns(
    groups: Iterable[list[RolloutRecord]], dataset: Iterable[Mapping[str, Any]], name: str
) -> Iterator[dict[str, Any]]:
    """The row of each group: the one of its index, or where that has another prompt, the first that has it."""
    by_prompt: dict[str, Mapping[str, Any]] = {}
    rest = iter(dataset)
    for group in groups:
        record = group[0]
        row: Mapping[str, Any] | None = None
        if isinstance(dataset, Dataset) and 0 <= record.prompt_index < len(dataset):
            row = dataset[record.prompt_index]
        if row is None or row.get("prompt") != record.prompt:
            row = by_prompt.get(_key(record.prompt))
        while row is None:
            candidate = next(rest, None)
            if candidate is None:
                raise ValueError(
                    f"no row of {name} has the prompt of step {record.step}, prompt {record.prompt_index}: give the "
                    "dataset of the run with --data"
                )
            key = _key(candidate.get("prompt"))
            by_prompt.setdefault(key, candidate)
            row = by_prompt.get(_key(record.prompt))
        yield {key: value for key, value in row.items() if key not in ("prompt", "completion", "completion_ids")}


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
