"""What `colora rewards replay` says: rewards and advantages as they were, and as another function makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rewards.runner import RewardFailure
from ..rewards.scoring import none_if_nan
from ..rollout.records import RolloutRecord

Numbers = NDArray[np.float64]
TABLE_ROWS = 20  # of steps; where there are more, a row is of several
TEXT_WIDTH = 300  # characters of a prompt or a completion that is shown
REASON_WIDTH = 160


@dataclass(frozen=True)
class Comparison:
    """Rollouts with what they got and what they would get; all arrays (records,).

    Attributes:
        sizes: completions of each group; a group's records are consecutive.
        old, new: the rewards that are compared; NaN where None.
        old_totals, new_totals: the weighted sums; NaN where no function scored.
        old_advantages, new_advantages: NaN for records that were not trained on.
    """

    records: list[RolloutRecord]
    sizes: list[int]
    old: Numbers
    new: Numbers
    old_totals: Numbers
    new_totals: Numbers
    old_advantages: Numbers
    new_advantages: Numbers

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """Whose advantage changes its sign."""
        return self.old_advantages * self.new_advantages < 0

    def rows(self) -> list[dict[str, Any]]:
        """The rollouts as a table."""
        return [
            {
                "step": record.step,
                "prompt_index": record.prompt_index,
                "sample": record.sample,
                "prompt": record.prompt,
                "completion": record.completion,
                "used": record.used,
                "old_reward": none_if_nan(self.old[place]),
                "new_reward": none_if_nan(self.new[place]),
                "old_advantage": none_if_nan(self.old_advantages[place]),
                "new_advantage": none_if_nan(self.new_advantages[place]),
            }
            for place, record in enumerate(self.records)
        ]

    def disagreements(self) -> NDArray[np.int64]:
        """Places of the records, those first whose advantages differ most, each in units of its own deviation."""
        used = ~np.isnan(self.old_advantages)
        distance = np.abs(_scaled(self.old_advantages) - _scaled(self.new_advantages))
        order = np.argsort(-np.where(used, distance, -1.0), kind="stable")
        return order[distance[order] > 0]


def describe_replay(
    title: str, found: Comparison, failures: Sequence[RewardFailure], notes: Sequence[str], examples: int
) -> str:
    """The report for people."""
    steps = sorted({record.step for record in found.records})
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    lines = [title, f"{span}: {len(found.records)} completions in {len(found.sizes)} groups"]
    lines += [f"note: {note}" for note in notes]
    if failures:
        reason = " ".join(failures[0].reason.split())[:REASON_WIDTH]
        lines.append(f"failures    {len(failures)} completions are not scored; the first: {failures[0].kind}: {reason}")
    lines += [_rewards(found), _signs(found), _signal(found), "", *_table(found, steps)]
    for place in found.disagreements()[:examples].tolist():
        lines += ["", *_example(found, place)]
    return "\n".join(lines)


def correlations(old: Numbers, new: Numbers) -> tuple[float, float] | None:
    """Pearson's and Spearman's (ties share their mean rank) correlation of two (n,) arrays; None where one is constant.

    NaN leaves a pair out.
    """
    both = ~np.isnan(old) & ~np.isnan(new)
    old, new = old[both], new[both]
    if len(old) < 2 or old.min() == old.max() or new.min() == new.max():
        return None
    pearson, spearman = (float(np.corrcoef(*pair)[0, 1]) for pair in ((old, new), (_ranks(old), _ranks(new))))
    return pearson, spearman


def _ranks(values: Numbers) -> Numbers:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _rewards(found: Comparison) -> str:
    of = correlations(found.old, found.new)
    text = f"Pearson {of[0]:.3f}, Spearman {of[1]:.3f}" if of else "no correlation, as one of the two is constant"
    alone = int((np.isnan(found.old) != np.isnan(found.new)).sum())
    only = f"; {alone} completions are scored by only one of the two" if alone else ""
    return f"rewards     {text}; mean {_mean(found.old)} -> {_mean(found.new)}{only}"


def _signs(found: Comparison) -> str:
    old, new = found.old_advantages, found.new_advantages
    used = int((~np.isnan(old)).sum())
    flipped, lost, gained = (
        int(which.sum()) for which in (found.flipped, (old != 0) & (new == 0), (old == 0) & (new != 0))
    )
    return (
        f"advantages  {flipped} of {used} ({flipped / max(used, 1):.1%}) change their sign, {lost} become 0, "
        f"{gained} are 0 no more"
    )


def _signal(found: Comparison) -> str:
    old, new = (_spread(totals, found.sizes) for totals in (found.old_totals, found.new_totals))
    both, lost, gained = int((old & new).sum()), int((old & ~new).sum()), int((~old & new).sum())
    return (
        f"signal      {both} of {len(found.sizes)} groups keep it, {lost} lose it, {gained} gain it, "
        f"{len(found.sizes) - both - lost - gained} have none with either"
    )


def _spread(totals: Numbers, sizes: Sequence[int]) -> NDArray[np.bool_]:
    """(groups,): whether a group's rewards are not all equal."""
    parts = np.split(totals, np.cumsum(sizes)[:-1])
    scored = [part[~np.isnan(part)] for part in parts]
    return np.array([len(part) > 1 and part.min() < part.max() for part in scored])


def _table(found: Comparison, steps: Sequence[int]) -> list[str]:
    """Means by step, or by as many steps in a row as keep the table short."""
    of = np.array([record.step for record in found.records])
    width = -(-len(steps) // TABLE_ROWS)
    lines = [f"{'step':>12} {'completions':>12} {'mean old':>10} {'mean new':>10} {'sign changed':>13}"]
    for start in range(0, len(steps), width):
        part = steps[start : start + width]
        inside = np.isin(of, part)
        name = str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"
        share = found.flipped[inside].mean()
        old, new = _mean(found.old[inside]), _mean(found.new[inside])
        lines.append(f"{name:>12} {inside.sum():>12} {old:>10} {new:>10} {share:>13.1%}")
    return lines


def _example(found: Comparison, place: int) -> list[str]:
    record = found.records[place]
    rewards = f"reward {_shown(found.old[place])} -> {_shown(found.new[place])}"
    advantages = f"advantage {found.old_advantages[place]:+.2f} -> {found.new_advantages[place]:+.2f}"
    return [
        f"step {record.step}, prompt {record.prompt_index}, sample {record.sample}: {rewards}, {advantages}",
        f"  prompt:     {_text(record.prompt)}",
        f"  completion: {_text(record.completion)}",
    ]


def _text(conversation: Any) -> str:
    """A prompt or completion (of messages the last one) on one line, its tail where it is too long."""
    text = conversation if isinstance(conversation, str) else str((conversation or [{}])[-1].get("content") or "")
    line = repr(text)[1:-1]
    return line if len(line) <= TEXT_WIDTH else f"... {line[4 - TEXT_WIDTH :]}"


def _scaled(values: Numbers) -> Numbers:
    deviation = np.nanstd(values) if not np.isnan(values).all() else 0.0
    return values / deviation if deviation else values


def _mean(values: Numbers) -> str:
    scored = values[~np.isnan(values)]
    return f"{scored.mean():.4g}" if len(scored) else "none"


def _shown(value: float) -> str:
    return "None" if np.isnan(value) else f"{value:.4g}"
