"""What `colora rewards run` says of a reward function: its values, its time, its failures, its ties."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..rewards.runner import RewardScores

BINS = 8  # of a histogram; as many different values have a line each instead
BAR_WIDTH = 32  # characters
REASONS = 5  # that are shown of a function's failures, the most frequent first
REASON_WIDTH = 160  # characters


@dataclass(frozen=True)
class Failure:
    """A completion on which a function failed: its place among all, and its row in the file."""

    place: int
    row: int
    kind: str
    reason: str


@dataclass(frozen=True)
class FunctionReport:
    """The scores of one function.

    Attributes:
        values: (completions,), groups one after the other; NaN where it returned None or failed.
        sizes: completions of each group.
        seconds: of each call, one a group; empty for the weighted sum of several functions.
    """

    name: str
    values: NDArray[np.float64]
    sizes: list[int]
    seconds: list[float]
    failures: list[Failure]

    @classmethod
    def of(
        cls, name: str, index: int, scores: Sequence[RewardScores], rows: Sequence[Sequence[int]]
    ) -> "FunctionReport":
        """That of function number `index`; `rows` has the rows of each group."""
        failures, first = [], 0
        for score, group in zip(scores, rows, strict=True):
            for failure in (failure for failure in score.failures if failure.function == name):
                samples = range(len(group)) if failure.sample is None else [failure.sample]  # None: the whole call
                failures += [Failure(first + i, group[i], failure.kind, failure.reason) for i in samples]
            first += len(group)
        values = np.concatenate([score.values[:, index].double().numpy() for score in scores])
        return cls(name, values, [len(group) for group in rows], [score.seconds[name] for score in scores], failures)

    @classmethod
    def of_total(
        cls, weights: Sequence[float], scores: Sequence[RewardScores], rows: Sequence[Sequence[int]]
    ) -> "FunctionReport":
        """That of the weighted sum, which leaves out functions that did not score a completion."""
        values = np.concatenate([score.values.double().numpy() for score in scores])
        total = np.nansum(values * np.asarray(weights), axis=1)
        total[np.isnan(values).all(axis=1)] = math.nan
        return cls("total (weighted sum)", total, [len(group) for group in rows], [], [])

    def groups(self) -> list[NDArray[np.float64]]:
        """The scored values of each group."""
        parts = np.split(self.values, np.cumsum(self.sizes)[:-1])
        return [part[~np.isnan(part)] for part in parts]


def describe_run(head: str, reports: Sequence[FunctionReport], seconds: float) -> str:
    """The report for people."""
    completions = len(reports[0].values)
    speed = f"scored in {seconds:.2f} s, {_rate(completions, seconds)}"
    return "\n".join([f"{head}; {speed}", *(line for report in reports for line in ["", *_lines(report)])])


def _lines(report: FunctionReport) -> list[str]:
    values = report.values[~np.isnan(report.values)]
    failed = sum(math.isnan(report.values[place]) for place in {failure.place for failure in report.failures})
    none = len(report.values) - len(values) - failed
    lines = [report.name, f"  scored     {len(values)} of {len(report.values)}, None {none}, failed {failed}"]
    if len(values):
        low, high = values.min(), values.max()
        middle = f"mean {values.mean():.4g}, median {np.median(values):.4g}, std {values.std():.4g}"
        lines += [f"  values     min {low:.4g}, {middle}, max {high:.4g}", *_histogram(values)]
    return [*lines, *_times(report), *_ties(report), *_failures(report.failures)]


def _histogram(values: NDArray[np.float64]) -> list[str]:
    different, counts = np.unique(values, return_counts=True)
    labels = [f"{value:.4g}" for value in different]
    if len(different) > BINS:
        counts, edges = np.histogram(values, bins=BINS)
        labels = [f"{low:.4g} to {high:.4g}" for low, high in zip(edges, edges[1:], strict=False)]
    width = max(map(len, labels))
    longest = counts.max()
    return [
        f"    {label:>{width}} |{'#' * math.ceil(BAR_WIDTH * count / longest):<{BAR_WIDTH}}| {count}"
        for label, count in zip(labels, counts.tolist(), strict=True)
    ]


def _times(report: FunctionReport) -> list[str]:
    if not report.seconds:
        return []
    middle, late = np.percentile(report.seconds, [50, 95])
    sizes = sorted({min(report.sizes), max(report.sizes)})
    of = " to ".join(map(str, sizes)) + (" completion" if sizes == [1] else " completions")
    rate = _rate(len(report.values), sum(report.seconds))
    slowest = max(report.seconds)
    return [f"  time       p50 {_ms(middle)}, p95 {_ms(late)}, max {_ms(slowest)} a call of {of}; {rate}"]


def _rate(completions: int, seconds: float) -> str:
    rate = completions / max(seconds, 1e-9)
    return f"{rate:,.0f} completions/s" if rate >= 100 else f"{rate:.3g} completions/s"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ties(report: FunctionReport) -> list[str]:
    """Groups that would train nothing, and pairs of completions that the function does not tell apart."""
    groups = [group for group in report.groups() if len(group) > 1]
    if not groups:
        return ["  ties       no group has two scored completions to compare"]
    tied = sum(group.min() == group.max() for group in groups)
    pairs = sum(len(group) * (len(group) - 1) // 2 for group in groups)
    equal = sum(int(n) * (int(n) - 1) // 2 for group in groups for n in np.unique(group, return_counts=True)[1])
    share = f"{tied} of {len(groups)} groups without a signal ({tied / len(groups):.1%})"
    return [f"  ties       {share}: their rewards are equal; {equal / pairs:.1%} of pairs are equal"]


def _failures(failures: Sequence[Failure]) -> list[str]:
    if not failures:
        return []
    reasons = Counter((failure.kind, _line(failure.reason)) for failure in failures)
    lines = []
    for (kind, reason), count in reasons.most_common(REASONS):
        first = next(f.row for f in failures if (f.kind, _line(f.reason)) == (kind, reason))
        lines.append(f"  failures   {count} x {kind}: {reason} (first: row {first})")
    hidden = len(reasons) - REASONS
    return [*lines, *([f"  failures   and {hidden} other reasons"] if hidden > 0 else [])]


def _line(reason: str) -> str:
    """A reason on one line of bounded length."""
    line = " ".join(reason.split())
    return line if len(line) <= REASON_WIDTH else f"{line[: REASON_WIDTH - 4]} ..."
