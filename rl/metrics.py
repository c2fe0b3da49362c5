"""Accumulating metrics between two logs, by name, under TRL's names where TRL has one."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .streams import Sequences


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

    def state(self) -> dict[str, Any]:
        """What was noted since the last log, for a checkpoint; made of JSON's types."""
        return {"values": dict(self._values), "latest": dict(self._latest)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._values = defaultdict(list, {name: list(values) for name, values in state["values"].items()})
        self._latest = dict(state["latest"])


@dataclass(frozen=True)
class Summary:
    """One statistic over the tokens of an optimizer step, and over its sequences' means; NaN where there were none."""

    mean: float = math.nan
    smallest: float = math.nan
    largest: float = math.nan
    sequence_mean: float = math.nan
    sequence_smallest: float = math.nan
    sequence_largest: float = math.nan


class TokenStatistics:
    """Per-token statistics of one optimizer step's micro-batches; stays on the device until `summaries` reads it."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, statistics: Mapping[str, Tensor], sequences: Sequences) -> None:
        """Note a micro-batch's statistics, (tokens,) each; masked tokens and sequences without others do not count."""
        if not statistics or not sequences.mask.numel():
            return
        values = torch.stack([value.detach().double() for value in statistics.values()])
        means = torch.stack([sequences.means(row) for row in values * sequences.mask])
        over_tokens = _reduce(values, sequences.mask)
        over_sequences = _reduce(means, sequences.counts(torch.float64) > 0)
        for name, row in zip(statistics, torch.cat([over_tokens, over_sequences], dim=1), strict=True):
            self._rows[name].append(row)

    def summaries(self) -> defaultdict[str, Summary]:
        """Each statistic over all micro-batches; a name that was never noted has NaN. Waits for the device once."""
        result: defaultdict[str, Summary] = defaultdict(Summary)
        if not self._rows:
            return result
        table = torch.stack([row for rows in self._rows.values() for row in rows]).cpu()
        for name, part in zip(self._rows, table.split([len(rows) for rows in self._rows.values()]), strict=True):
            total, count, least, most = part[:, 0::4].sum(0), part[:, 1::4].sum(0), part[:, 2::4], part[:, 3::4]
            if count[0] > 0:
                columns = torch.stack([total / count, least.amin(0), most.amax(0)]).T
                result[name] = Summary(*columns.flatten().tolist())
        return result


def _reduce(values: Tensor, mask: Tensor) -> Tensor:
    """(statistics, n) and (n,) -> (statistics, 4): sum, count, smallest and largest of the unmasked."""
    return torch.stack(
        [
            torch.where(mask, values, 0).sum(1),
            mask.sum().expand(len(values)).double(),
            torch.where(mask, values, math.inf).amin(1),
            torch.where(mask, values, -math.inf).amax(1),
        ],
        dim=1,
    )
