"""What a reward function logs during a call. Imports nothing heavy: the worker processes load it too."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Without those that have a slash, such as `rewards/NAME/mean`.
METRICS_OF_THE_TRAINER = frozenset(
    (
        *("loss", "grad_norm", "learning_rate", "epoch", "step", "step_time", "num_tokens", "kl", "entropy"),
        *("reward", "reward_std", "frac_reward_zero_std", "frac_groups_without_signal"),
    )
)


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
        """Record a scalar. Several values of one name in a step are averaged.

        Raises ValueError for a name under which the trainer logs something else, which would be averaged in.
        """
        if name in METRICS_OF_THE_TRAINER:
            raise ValueError(f"log_metric({name!r}, ...): the trainer logs its own {name}; choose another name")
        self.metrics.setdefault(name, []).append(float(value))
