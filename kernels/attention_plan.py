"""Which kernel computes what of a packed row's attention; the figures are those of benchmarks/attention.py.

    dense: cuDNN's attention, which knows "causal" and equal lengths and nothing else (attention_dense.py): a sequence
        of at least DENSE_FROM tokens, or a row of equal sequences of at least EQUAL_FROM tokens, which is a batch as it
        lies there. From about 2K tokens on it beats `varlen` although each sequence is a call (uneven_*).
    varlen: FlashAttention-2, which takes a run of shorter sequences in one call (all of them where the row begins with
        its longest), and rows with sliding windows; see attention_varlen.py. FlexAttention is about as fast only where
        it is compiled, for seconds, for the very length of the row (peers of grpo_* and window*). It also takes what
        cuDNN has no kernel for.

A new length in a bucket that is known to cuDNN needs no plan (second_length_in_bucket_ms), and `varlen` needs none at
all (second_length_ms).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from .row_layout import Entry

DENSE_FROM = 2048  # a sequence of so many tokens gets a call of its own (uneven_*)
EQUAL_FROM = 1024  # equal sequences of so many tokens are one batch


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of a row whose queries one kernel takes.

    Attributes:
        lengths: of its sequences, equal ones where `dense`.
        dense: for cuDNN.
        window: see `packed_attention`; None where no sequence is longer.
        prompt: tokens just before them in the row which begin all of these sequences, where there is a window; or 0.
    """

    lengths: tuple[int, ...]
    dense: bool = False
    window: int | None = None
    prompt: int = 0


@dataclass(frozen=True)
class Plan:
    """How a row is computed.

    Attributes:
        segments: the whole row, one behind the other.
        prompts: (first token, last token + 1, last token + 1 of its continuations) of each prompt whose continuations
            are sequences in `segments`, to which it is added.
    """

    segments: tuple[Segment, ...]
    prompts: tuple[tuple[int, int, int], ...] = ()


@lru_cache(maxsize=64)
def attention_plan(layout: tuple[Entry, ...], window: int | None = None, dense_from: int = DENSE_FROM) -> Plan:
    """Cut a row into segments; the rule is at the top of the page.

    Prompts and continuations are sequences like others, but where a window reaches from a continuation into its prompt
    and not to its beginning.

    Args:
        layout, window: see `packed_attention`.
        dense_from: tokens from which a sequence among others gets a dense call of its own.
    """
    segments: list[Segment] = []
    prompts: list[tuple[int, int, int]] = []
    run: list[int] = []
    start = 0
    for entry in layout:
        prompt, *continuations = (entry,) if isinstance(entry, int) else entry
        run.append(prompt)
        stop = start + prompt + sum(continuations)
        if continuations and window is not None and window < prompt + max(continuations):
            segments += _plan_of_sequences(run, window, dense_from)
            segments.append(Segment(tuple(continuations), window=window, prompt=prompt))
            run = []
        elif continuations:
            run += continuations
            prompts.append((start, start + prompt, stop))
        start = stop
    return Plan((*segments, *_plan_of_sequences(run, window, dense_from)), tuple(prompts))


def _plan_of_sequences(lengths: Sequence[int], window: int | None, dense_from: int) -> list[Segment]:
    if window is not None and window < max(lengths, default=0):
        return [Segment(tuple(lengths), window=window)]
    if len(lengths) > 1 and len(set(lengths)) == 1 and lengths[0] >= EQUAL_FROM:
        return [Segment(tuple(lengths), dense=True)]
    segments: list[Segment] = []
    for is_dense, group in groupby(lengths, lambda length: length >= dense_from):
        run = tuple(group)
        segments += [Segment((length,), dense=True) for length in run] if is_dense else [Segment(run)]
    return segments
