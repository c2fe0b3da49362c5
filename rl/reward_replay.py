"""`colora rewards replay`: the rollouts of a past run scored by a new function, and what would have changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards.calls import RewardBatch
from ..rewards.runner import RewardScores
from ..rewards.scoring import none_if_nan
from ..rewards.worker import StateView
from ..rollout.records import RolloutRecord
from .advantages import total_rewards
from .rating import record_advantages, reward_values, reward_weights
from .reward_lab_scoring import Scoring, check_output, progress, score_batches, write_table
from .reward_replay_report import Comparison, describe_replay
from .reward_replay_run import PastRun, read_past_run

TOLERANCE = 1e-4  # of a recorded advantage against what the run's options give


def replay_rewards(
    scoring: Scoring,
    directory: Path,
    against: str | None = None,
    steps: tuple[int | None, int | None] = (None, None),
    data: str | None = None,
    examples: int = 3,
    output: Path | None = None,
) -> tuple[str, int]:
    """Score a run's rollouts with other functions. Nothing is written into the run.

    Args:
        directory: the output directory of the run.
        against: the recorded reward that the one new function takes the place of, at its weight; None: the new
            functions take the place of all the run's. What options add to the reward (`overlong`, `kl`) stays.
        steps: the first and the last step; None: the run's own.
        data: what holds the dataset's other columns, by prompt; None: the dataset that the run names.
        examples: how many of the largest disagreements are shown.
        output: a .parquet or .jsonl file for the rollouts with both rewards and advantages.

    Returns:
        A report for people, and the number of completions that a function failed on.

    Raises:
        ValueError: the run, its dataset or the options are not usable; says what to do.
    """
    check_output(output, data)
    runner = scoring.runner()
    run = read_past_run(directory, steps, data)
    records = list(chain.from_iterable(run.groups))
    old_weights = _run_weights(run, records)
    if against is not None and (against not in old_weights or len(runner.names) > 1):
        known = f"the run recorded the rewards {', '.join(old_weights)}"
        raise ValueError(f"--against {against}: {'give one --reward' if against in old_weights else known}")
    try:
        runner.check_columns(run.columns[0])
    except ValueError as error:
        raise ValueError("\n".join([str(error), *run.notes])) from error
    batches = [_batch(group, columns) for group, columns in zip(run.groups, run.columns, strict=True)]
    with progress(len(records)) as report:
        scores = score_batches(scoring, batches, report)
    if against is None:
        new_weights = reward_weights(dict(zip(runner.names, runner.weights, strict=True)), run.config)
        names = list(runner.names)
    else:
        new_weights, names = old_weights, [against]
    again = _with_rewards(records, scores, names, [name for name in new_weights if name not in names])
    comparison = _compare(run, records, again, (old_weights, new_weights), against)
    failures = [failure for score in scores for failure in score.failures]
    title = f"{', '.join(runner.names)} in place of {against or ', '.join(_functions(run, records))}"
    if output is not None:
        write_table(output, comparison.rows())
    return describe_replay(f"{directory}: {title}", comparison, failures, run.notes, examples), len(failures)


def _run_weights(run: PastRun, records: Sequence[RolloutRecord]) -> dict[str, float]:
    """The weight of each recorded reward, by name."""
    names = _functions(run, records)
    weights = run.config.reward_weights or []
    if len(weights) > len(names):
        raise ValueError(f"the run's reward_weights has {len(weights)} entries for the rewards {', '.join(names)}")
    weights = [*weights, *[1.0] * (len(names) - len(weights))]  # what environments give comes last and counts once
    return reward_weights(dict(zip(names, weights, strict=True)), run.config)


def _functions(run: PastRun, records: Sequence[RolloutRecord]) -> list[str]:
    """The names of the run's reward functions, without the terms that options add."""
    added = reward_weights({}, run.config)
    return [name for name in records[0].rewards if name not in added]


def _batch(group: Sequence[RolloutRecord], columns: Mapping[str, Any]) -> RewardBatch:
    return RewardBatch(
        [record.prompt for record in group],
        [record.completion for record in group],
        [record.trajectory.completion_ids for record in group],
        {name: [value] * len(group) for name, value in columns.items()},
        StateView({"global_step": group[0].step - 1}),  # what the trainer's state has while it generates for a step
    )


def _with_rewards(
    records: Sequence[RolloutRecord], scores: Sequence[RewardScores], names: Sequence[str], kept: Sequence[str]
) -> list[RolloutRecord]:
    """The records with new rewards under `names`, and the recorded ones of `kept`."""
    values = torch.cat([score.values for score in scores]).tolist()
    return [
        replace(
            record,
            rewards={name: record.rewards.get(name) for name in kept}
            | {name: none_if_nan(value) for name, value in zip(names, row, strict=True)},
        )
        for record, row in zip(records, values, strict=True)
    ]


def _compare(
    run: PastRun,
    records: Sequence[RolloutRecord],
    again: Sequence[RolloutRecord],
    weights: tuple[Mapping[str, float], Mapping[str, float]],
    against: str | None,
) -> Comparison:
    old_totals, new_totals = (
        total_rewards(reward_values(part, of), torch.tensor(list(of.values())))
        for part, of in zip((records, again), weights, strict=True)
    )
    old, new = old_totals, new_totals
    if against is not None:
        old, new = (reward_values(part, [against])[:, 0] for part in (records, again))
    old_advantages = _advantages(run, records, weights[0])
    recorded = torch.tensor([record.advantage if record.used else torch.nan for record in records])
    gap = (recorded - old_advantages).abs().nan_to_num(nan=0.0).max().item()
    if gap > TOLERANCE:
        run.notes.append(
            f"the recorded advantages differ by up to {gap:.2g} from those that the run's rewards and options give, "
            "which are compared here"
        )
    return Comparison(
        records=list(records),
        sizes=[len(group) for group in run.groups],
        old=old.double().numpy(),
        new=new.double().numpy(),
        old_totals=old_totals.double().numpy(),
        new_totals=new_totals.double().numpy(),
        old_advantages=old_advantages.double().numpy(),
        new_advantages=_advantages(run, again, weights[1]).double().numpy(),
    )


def _advantages(run: PastRun, records: Sequence[RolloutRecord], weights: Mapping[str, float]) -> Tensor:
    """(records,) fp32: NaN where a record was not used; 0, not a rounding error, where there is nothing to learn."""
    size = len(run.groups[0])
    if any(len(group) != size for group in run.groups):
        raise ValueError("the run's groups differ in size: choose steps of one part of it with --steps")
    advantages = torch.full((len(records),), torch.nan)
    for step in sorted({record.step for record in records}):
        places = [place for place, record in enumerate(records) if record.step == step and record.used]
        rated = record_advantages([records[place] for place in places], weights, size, run.config)
        advantages[places] = rated.advantages.where(rated.informative, 0.0)
    return advantages
