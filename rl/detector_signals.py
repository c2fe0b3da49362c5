"""What detectors look at: numbers from the records of one generation, and how they change over generations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rollout.records import RolloutRecord

Numbers = NDArray[np.float64]
NOISE = 1e-6  # relative; rewards are float32


def totals(records: Sequence[RolloutRecord], size: int) -> Numbers:
    """(groups, size): the rewards, NaN where no function scored."""
    values = [np.nan if record.reward is None else record.reward for record in records]
    return np.array(values, dtype=np.float64).reshape(-1, size)


@dataclass(frozen=True)
class Spread:
    """The rewards of the groups with two scored completions or more, all (groups,).

    Attributes:
        means: of a group's rewards.
        stds: their deviation (of the population); 0 where all are equal.
    """

    means: Numbers
    stds: Numbers

    @classmethod
    def of(cls, rewards: Numbers) -> "Spread":
        """Of (groups, size) rewards."""
        rewards = rewards[(~np.isnan(rewards)).sum(axis=1) > 1]
        if not len(rewards):
            return cls(np.empty(0), np.empty(0))
        equal = np.nanmax(rewards, axis=1) == np.nanmin(rewards, axis=1)
        return cls(np.nanmean(rewards, axis=1), np.where(equal, 0.0, np.nanstd(rewards, axis=1)))


@dataclass(frozen=True)
class Components:
    """The parts of the rewards, by name.

    Attributes:
        shares: of the variance of the total within groups, Cov(w_k r_k, R) / Var R summed over groups; they add to 1.
        varying: of the groups, those in which this part differs at all.
    """

    shares: dict[str, float]
    varying: dict[str, float]

    @classmethod
    def of(cls, records: Sequence[RolloutRecord], size: int, weights: Mapping[str, float]) -> "Components | None":
        """None where there are not two weighted parts, or no total varies. A part that did not score counts as 0."""
        names = [name for name, weight in weights.items() if weight and name in records[0].rewards]
        if len(names) < 2:
            return None
        values = [[(record.rewards.get(name) or 0.0) * weights[name] for record in records] for name in names]
        parts = np.array(values, dtype=np.float64).reshape(len(names), -1, size)
        centred = parts - parts.mean(axis=2, keepdims=True)
        total = centred.sum(axis=0)
        variance = float((total**2).sum())
        if variance <= NOISE**2 * float((parts**2).sum()):
            return None
        shares = (centred * total).sum(axis=(1, 2)) / variance
        varying = (np.ptp(parts, axis=2) > NOISE * np.abs(parts).max(axis=2)).mean(axis=1)
        return cls(dict(zip(names, shares.tolist(), strict=True)), dict(zip(names, varying.tolist(), strict=True)))


def duplicate_share(records: Sequence[RolloutRecord], size: int) -> float:
    """Share of the completions that are copies, token by token, of another one of their group that came before."""
    completions = [tuple(record.trajectory.completion_ids) for record in records]
    groups = [completions[start : start + size] for start in range(0, len(completions), size)]
    return sum(len(group) - len(set(group)) for group in groups) / len(completions)


class Trend:
    """The early and the recent level of a value, means over `window` generations each."""

    def __init__(self, window: int, early: Sequence[float] = (), last: Sequence[float] = (), count: int = 0):
        self.window, self._early, self._last, self.count = window, list(early), list(last), count

    def add(self, value: float) -> None:
        """Note a generation's value; one that is not finite is left out."""
        if math.isfinite(value):
            self.count += 1
            if len(self._early) < self.window:
                self._early.append(value)
            self._last = [*self._last, value][-self.window :]

    @property
    def whole(self) -> bool:
        """Whether the recent level is one of a whole window."""
        return self.count >= self.window

    @property
    def compares(self) -> bool:
        """Whether the early and the recent level are of different generations."""
        return self.count >= 2 * self.window

    @property
    def early(self) -> float:
        return float(np.mean(self._early)) if self._early else 0.0

    @property
    def recent(self) -> float:
        return float(np.mean(self._last)) if self._last else 0.0

    @property
    def recent_error(self) -> float:
        """The standard error of the recent level."""
        return float(np.std(self._last, ddof=1)) / math.sqrt(len(self._last)) if len(self._last) > 1 else 0.0

    def state(self) -> dict[str, Any]:
        return {"early": self._early, "last": self._last, "count": self.count}
