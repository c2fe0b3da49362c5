"""What a reward function logs during a call. Imports nothing heavy: the worker processes load it too."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


def shorten(value: Any, limit: int = 240) -> str:
    """The repr of `value` in at most `limit` characters. Head and tail stay: an answer usually stands at the end."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


@dataclass
class CallLog:
    """What a reward function logged during one call; local to the call, so that a call can run anywhere."""

    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add `values` to a column of the completions table: one value per completion, in one call or bit by bit."""
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise TypeError(
                f"log_extra({column!r}, ...) needs a list with one value per completion, got {shorten(values)}"
            )
        self.extra.setdefault(column, []).extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """Record a scalar. Several values of one name in a step are averaged."""
        self.metrics.setdefault(name, []).append(float(value))
