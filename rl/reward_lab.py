"""`colora rewards run`: reward functions on a file of completions, without a model, an engine or a GPU."""

import inspect
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..rewards.calls import RewardBatch
from ..rewards.scoring import none_if_nan
from ..rewards.worker import StateView
from .dataset_files import open_rows
from .reward_lab_report import FunctionReport, describe_run
from .reward_lab_scoring import Scoring, check_output, progress, score_batches, write_table

PROMPTS = ("prompt", "prompts")
COMPLETIONS = ("completion", "completions")
IDS = "completion_ids"


@dataclass(frozen=True)
class Sample:
    """One completion of the file.

    Attributes:
        row: where it stands in the file, from 1.
        group: what it is compared within: equal for the completions of one prompt; None: with nothing.
        prompt, completion: text or messages; `prompt` None where the file has none.
        ids: the completion's tokens; None where nothing gives them, so that a function that reads them fails.
        columns: the row's other values.
    """

    row: int
    group: str | None
    prompt: Any
    completion: Any
    ids: list[int] | None
    columns: dict[str, Any]


def run_lab(
    scoring: Scoring,
    data: str,
    limit: int | None = None,
    group_by: str | None = None,
    tokenizer: str | None = None,
    output: Path | None = None,
) -> tuple[str, int]:
    """Score a file.

    Args:
        data: a file or whatever else `open_rows` opens, with a column `completion` or `completions` (a text, messages,
            or a list of such, all of the row's prompt), usually `prompt`; the others go to the functions.
        limit: only so many rows.
        group_by: the column that the completions of a group share; by default the prompt.
        tokenizer: a checkpoint whose tokenizer makes the `completion_ids` that the file lacks.
        output: a .parquet or .jsonl file for the rows with their rewards.

    Returns:
        A report for people, and the number of completions that a function failed on.

    Raises:
        ValueError: the file, its columns, or the options are not usable; says what to do.
    """
    check_output(output, data)
    runner = scoring.runner()
    samples = read_samples(data, limit, group_by)
    if tokenizer is not None:
        samples = _tokenized(samples, tokenizer)
    _check_needs(scoring.functions, runner.names, samples, data)
    runner.check_columns(samples[0].columns)
    groups = group_samples(samples)
    started = time.perf_counter()
    with progress(len(samples)) as report:
        scores = score_batches(scoring, [_batch(group) for group in groups], report)
    seconds = time.perf_counter() - started
    rows = [[sample.row for sample in group] for group in groups]
    reports = [FunctionReport.of(name, index, scores, rows) for index, name in enumerate(runner.names)]
    if len(reports) > 1:
        reports.append(FunctionReport.of_total(runner.weights, scores, rows))
    if output is not None:
        _write(output, groups, scores, runner.names, reports[-1])
    compared = group_by or ("prompt" if samples[0].group is not None else None)
    grouped = f", {len(groups)} group{'s' * (len(groups) > 1)} by {compared}" if compared else ""
    head = f"{data}: {len(samples)} completion{'s' * (len(samples) > 1)}{grouped}"
    return describe_run(head, reports, seconds), sum(len(report.failures) for report in reports)


def read_samples(data: str, limit: int | None = None, group_by: str | None = None) -> list[Sample]:
    """The completions of a file. Raises ValueError where it has none, or lacks the column `group_by`."""
    dataset = open_rows(data)
    rows = list(islice(dataset, limit))
    columns = list(rows[0]) if rows else []
    completion = next((name for name in COMPLETIONS if name in columns), None)
    if completion is None:
        raise ValueError(
            f"{data} has no column `completion` or `completions`, only {', '.join(columns)}: rename the one that holds "
            "what the model wrote"
        )
    if group_by is not None and group_by not in columns:
        raise ValueError(f"--group-by {group_by}: {data} has no such column, only {', '.join(columns)}")
    prompt = next((name for name in PROMPTS if name in columns), None)
    key = group_by or prompt
    taken = {prompt, completion, IDS}
    samples = []
    for number, row in enumerate(rows, start=1):
        group = None if key is None else json.dumps(row[key], sort_keys=True, default=str)
        others = {name: value for name, value in row.items() if name not in taken}
        given = row.get(prompt) if prompt is not None else None
        for text in _several(row[completion], f"{data}, row {number}"):
            samples.append(Sample(number, group, given, text, row.get(IDS), others))
    if not samples:
        raise ValueError(f"{data} has no completions: the lists in column `{completion}` are empty")
    return samples


def group_samples(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each group together, groups in the order in which they begin; one without a group by itself."""
    groups: dict[Any, list[Sample]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(number if sample.group is None else sample.group, []).append(sample)
    return list(groups.values())


def _several(value: Any, where: str) -> list[Any]:
    """The completions that a row holds: one text, one list of messages, or a list of such."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [value] if value and isinstance(value[0], dict) else value
    raise ValueError(f"{where}: a completion is a text or a list of messages, got {type(value).__name__}")


def _tokenized(samples: list[Sample], name: str) -> list[Sample]:
    """The samples with the tokens of their texts where they have none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name}: {error}") from error
    texts = [text if isinstance(text, str) else str(text[-1].get("content") or "") for text in _completions(samples)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        Sample(s.row, s.group, s.prompt, s.completion, s.ids or list(tokens), s.columns)
        for s, tokens in zip(samples, ids, strict=True)
    ]


def _completions(samples: Iterable[Sample]) -> list[Any]:
    return [sample.completion for sample in samples]


def _check_needs(
    functions: Sequence[Callable[..., Any]], names: Sequence[str], samples: Sequence[Sample], data: str
) -> None:
    """Raise ValueError for a function that names what the file does not have but training would."""
    remedies = {
        IDS: "add the column, or give --tokenizer, the checkpoint whose tokens they are",
        "prompts": "add a column `prompt`",
    }
    missing = {IDS} if any(sample.ids is None for sample in samples) else set()
    missing |= {"prompts"} if samples[0].prompt is None else set()
    for function, name in zip(functions, names, strict=True):
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # some built-in and extension functions have none
            continue
        needed = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD} & missing
        for argument in sorted(needed):
            raise ValueError(f"reward function {name!r} takes {argument}, which {data} lacks: {remedies[argument]}")


def _batch(group: Sequence[Sample]) -> RewardBatch:
    columns = {name: [sample.columns[name] for sample in group] for name in group[0].columns}
    prompts, ids = [sample.prompt for sample in group], [sample.ids for sample in group]
    return RewardBatch(prompts, _completions(group), ids, columns, StateView({"global_step": 0, "max_steps": 0}))


def _write(path: Path, groups: Any, scores: Any, names: Sequence[str], total: FunctionReport) -> None:
    """The file's rows, in its order, with `reward` (the weighted sum), `rewards`, and `reward_failure`."""
    rows, position = [], 0
    for group, score in zip(groups, scores, strict=True):
        for place, sample in enumerate(group):
            failed = [f"{f.function}: {f.reason}" for f in score.failures if f.sample in (place, None)]
            values = {name: none_if_nan(value) for name, value in zip(names, score.values[place].tolist(), strict=True)}
            row = {"prompt": sample.prompt, "completion": sample.completion} | sample.columns
            row |= {f"logged/{name}": logged[place] for name, logged in score.extra.items()}
            row |= {"reward": none_if_nan(total.values[position]), "rewards": values}
            rows.append((sample.row, row | {"reward_failure": "\n".join(failed) or None}))
            position += 1
    write_table(path, [row for _, row in sorted(rows, key=lambda numbered: numbered[0])])
