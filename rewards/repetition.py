"""A penalty for completions that say the same again and again."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .text import Completion, completion_text


def repeated_share(items: Sequence[Hashable], size: int) -> float:
    """Share of the n-grams of `size` items that occurred before in the sequence: 0 (all differ) to almost 1."""
    count = len(items) - size + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(items[start : start + size]) for start in range(count)}) / count


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of repeated n-grams in each completion: 0 where none is repeated, down to almost -1.

    Args:
        size: n, the items of an n-gram.
        unit: what the items are: "words" (white space apart, case folded), or "tokens", for scripts without spaces.

    Raises:
        ValueError: a size below 1, or another unit.
    """

    size: int = 4
    unit: Literal["words", "tokens"] = "words"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"RepetitionPenalty: size must be 1 or more, got {self.size}")
        if self.unit not in ("words", "tokens"):
            raise ValueError(f'RepetitionPenalty: unit must be "words" or "tokens", got {self.unit!r}')

    def __call__(
        self, completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        if self.unit == "tokens":
            return [-repeated_share(ids, self.size) for ids in completion_ids]
        return [-repeated_share(completion_text(text).casefold().split(), self.size) for text in completions]


def repetition_penalty(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Minus the share of each completion's 4-grams of words that occurred in it before."""
    return [-repeated_share(completion_text(text).casefold().split(), 4) for text in completions]
