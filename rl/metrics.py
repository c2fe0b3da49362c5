"""Accumulating metrics between two logs, by name, under TRL's names where TRL has one."""

import math
from collections import defaultdict

import torch
from torch import Tensor


class Metrics:
    """Values noted since the last log; `drain` gives their means. NaN values are left out, as in TRL."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._latest: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Note a value to be averaged."""
        self._values[name].append(float(value))

    def set(self, name: str, value: float) -> None:
        """Note a running total: the last value counts."""
        self._latest[name] = float(value)

    def drain(self, prefix: str = "") -> dict[str, float]:
        """Mean of each name since the last call; a name with only NaN values is left out."""
        means = {}
        for name, values in self._values.items():
            valid = [value for value in values if not math.isnan(value)]
            if valid:
                means[prefix + name] = sum(valid) / len(valid)
        means |= {prefix + name: value for name, value in self._latest.items()}
        self._values.clear()
        self._latest.clear()
        return means


class TokenStatistics:
    """Token-weighted means over the micro-batches of one optimizer step, and extremes over sequences."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._sequence_means: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor, sequence: Tensor | None = None) -> None:
        """Note per-token values (n,); with `sequence` (n,) also the mean of each sequence."""
        if values.numel() == 0:
            return
        self._sums[name] += values.sum().item()
        self._counts[name] += values.numel()
        if sequence is not None:
            totals = torch.zeros(int(sequence.max()) + 1, device=values.device)
            counts = torch.zeros_like(totals)
            totals.index_add_(0, sequence, values)
            counts.index_add_(0, sequence, torch.ones_like(values))
            self._sequence_means[name].append((totals / counts.clamp(min=1)).cpu())

    def mean(self, name: str) -> float:
        """Mean over all tokens; NaN where there were none."""
        return self._sums[name] / self._counts[name] if self._counts[name] else math.nan

    def sequence_extremes(self, name: str) -> tuple[float, float]:
        """(smallest, largest) of the sequences' means; NaN where there were none."""
        if not self._sequence_means[name]:
            return math.nan, math.nan
        means = torch.cat(self._sequence_means[name])
        return means.min().item(), means.max().item()
