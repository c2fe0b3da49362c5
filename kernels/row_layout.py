"""What lies in a packed row: sequences side by side, and continuations of one prompt behind it.

An entry of a layout is the tokens of a sequence, or (prompt, continuation, continuation, ...): a prompt that is there
once, and the tokens of each of its continuations. A token sees its own sequence up to itself; one of a continuation
sees the prompt and its own continuation up to itself, as if they were a sequence of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Entry = int | tuple[int, ...]
Layout = Sequence[Entry]


def entry_tokens(entry: Entry) -> int:
    return entry if isinstance(entry, int) else sum(entry)


def row_tokens(layout: Layout) -> int:
    return sum(map(entry_tokens, layout))


def is_layout(layout: Layout) -> bool:
    """Whether there is something, every length is at least 1, and every prompt has a continuation."""
    return bool(layout) and all(
        entry >= 1 if isinstance(entry, int) else len(entry) > 1 and min(entry) >= 1 for entry in layout
    )


def positions(layout: Layout) -> Tensor:
    """(tokens,) int64: of each token in its sequence; a continuation goes on where its prompt ends."""
    parts = []
    for entry in layout:
        prompt, *continuations = (entry,) if isinstance(entry, int) else entry
        parts.append(torch.arange(prompt))
        parts += [torch.arange(prompt, prompt + length) for length in continuations]
    return torch.cat(parts)


def prolonged(layout: Layout, padding: int) -> list[Entry]:
    """The layout of a row with so many tokens more at its end: its last sequence, or continuation, is longer."""
    *others, last = layout
    return [*others, last + padding if isinstance(last, int) else (*last[:-1], last[-1] + padding)]
