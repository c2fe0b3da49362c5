"""A penalty for long completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .text import Completion, completion_text


def linear_penalty(length: int, free: int, limit: int) -> float:
    """0 up to `free`, falling linearly to -1 at `limit` and beyond (DAPO, arXiv 2503.14476, equation 13)."""
    return -min(max(length - free, 0) / (limit - free), 1.0)


@dataclass(frozen=True)
class LengthPenalty:
    """0 for completions up to `free` long, falling linearly to -1 at `limit` and beyond.

    With `limit` = `max_completion_length` and `free` = `limit` - cache it is the soft overlong punishment of DAPO
    (Yu et al. 2025, arXiv 2503.14476, equation 13).

    Args:
        free, limit: lengths; 0 <= free < limit.
        unit: what is counted: "tokens" of the completion, or "characters" of its text.

    Raises:
        ValueError: bounds out of order, or another unit.
    """

    free: int
    limit: int
    unit: Literal["tokens", "characters"] = "tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.free < self.limit:
            raise ValueError(f"LengthPenalty needs 0 <= free < limit, got free={self.free}, limit={self.limit}")
        if self.unit not in ("tokens", "characters"):
            raise ValueError(f'LengthPenalty: unit must be "tokens" or "characters", got {self.unit!r}')

    def __call__(
        self, completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        if self.unit == "tokens":
            lengths = [len(ids) for ids in completion_ids]
        else:
            lengths = [len(completion_text(completion)) for completion in completions]
        return [linear_penalty(length, self.free, self.limit) for length in lengths]
