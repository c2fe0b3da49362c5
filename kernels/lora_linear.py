"""A frozen linear and its low-rank update (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3) as one operator.

This is what the rollout engine runs for every adapted projection. As an operator of its own it stays whole under
torch.compile and is captured in CUDA graphs; it reads the slots at the addresses it was captured with. Where W and A
lie in one matrix it is two launches (`lora_up`); otherwise the base product, one with every A, and one with each B.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora_add import LoraPart

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? stacked, "
    "int[] out_starts, int[] out_stops, int[] a_starts, int[] b_starts) -> Tensor"
)


@torch.library.custom_op("colora::lora_linear", mutates_args=(), schema=_SCHEMA)
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    stacked: Tensor | None,
    out_starts: list[int],
    out_stops: list[int],
    a_starts: list[int],
    b_starts: list[int],
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if stacked is not None and rows.is_cuda:  # where there is a GPU there is Triton
        from .lora_up import fits, lora_up

        if fits(rows.dtype, b.shape[1], out_starts, out_stops):
            both = F.linear(rows, stacked)
            y = lora_up(both, bias, b, weight.shape[0], out_starts, out_stops, a_starts, b_starts)
            return y.view(*x.shape[:-1], weight.shape[0])
    y = F.linear(rows, weight, bias)
    add_update_(y, rows, a, b, zip(out_starts, out_stops, a_starts, b_starts, strict=True))
    return y.view(*x.shape[:-1], weight.shape[0])


def add_update_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, parts: Iterable[tuple[int, int, int, int]]) -> None:
    """y += (x A^T) B^T on the columns of each part, for y (rows, out) and x (rows, in); one launch a part, and one.

    Args:
        parts: of each its first and last column in `y`, its first row in `a` and in `b`.
    """
    down, rank = x @ a.T, b.shape[1]
    for out_start, out_stop, a_start, b_start in parts:
        b_part = b[b_start : b_start + out_stop - out_start]
        y[:, out_start:out_stop].addmm_(down[:, a_start : a_start + rank], b_part.T)


@_lora_linear.register_fake
def _(x: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class PartOffsets:
    """The rows of `LoraPart`s as the lists of integers that an operator takes."""

    def __init__(self, parts: tuple[LoraPart, ...]):
        self.out_starts = [part.out.start for part in parts]
        self.out_stops = [part.out.stop for part in parts]
        self.a_starts = [part.a.start for part in parts]
        self.b_starts = [part.b.start for part in parts]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    offsets: PartOffsets,
    stacked: Tensor | None = None,
) -> Tensor:
    """x W^T + bias, plus (x A^T) B^T on the rows of each adapted part. Inference only: it has no gradient.

    Args:
        x: (..., in).
        weight: (out, in), frozen, same dtype.
        bias: (out,) or None.
        a: (adapted outputs * r, in), the stacked A in the compute dtype.
        b: (adapted rows, r), the stacked B in the compute dtype, already multiplied by alpha / r.
        offsets: where each adapted output lies.
        stacked: (out + adapted outputs * r, in), the matrix whose rows `weight` and then `a` are views of, if there is
            one.

    Returns:
        (..., out), same dtype.
    """
    return _lora_linear(
        x, weight, bias, a, b, stacked, offsets.out_starts, offsets.out_stops, offsets.a_starts, offsets.b_starts
    )
