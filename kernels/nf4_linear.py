"""A frozen NF4 linear and its low-rank update (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3) as one operator.

This is what the rollout engine runs for every quantised projection. As an operator of its own it stays whole under
torch.compile and is captured in CUDA graphs; it reads codes, scales and slots at the addresses it was captured with.
"""

from typing import Any

import torch
from torch import Tensor

from .frozen import frozen_linear
from .lora_linear import PartOffsets, add_update_
from .nf4 import NF4Tensor

_SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scale_codes, Tensor group_scales, Tensor group_start, Tensor offset, "
    "Tensor? bias, Tensor? a, Tensor? b, int[] out_starts, int[] out_stops, int[] a_starts, int[] b_starts) -> Tensor"
)


@torch.library.custom_op("colora::nf4_linear", mutates_args=(), schema=_SCHEMA)
def _nf4_linear(
    x: Tensor,
    codes: Tensor,
    scale_codes: Tensor,
    group_scales: Tensor,
    group_start: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    out_starts: list[int],
    out_stops: list[int],
    a_starts: list[int],
    b_starts: list[int],
) -> Tensor:
    rows, weight = x.reshape(-1, x.shape[-1]), NF4Tensor(codes, scale_codes, group_scales, group_start, offset)
    parts = tuple(zip(out_starts, out_stops, a_starts, b_starts, strict=True))
    if rows.is_cuda:  # where there is a GPU there is Triton
        from .few_rows_adapter import Adapter
        from .nf4_few_rows import fits, launch
        from .nf4_tuning import TUNING

        if fits(rows, len(parts), 0 if b is None else b.shape[1]):
            adapter = None if a is None or b is None else Adapter(a, b, parts)
            config = TUNING.chosen(rows.device, weight.shape, rows.shape[0])
            y = launch(rows, weight, bias, adapter, config)
            return y.view(*x.shape[:-1], weight.shape[0])
    y = frozen_linear(rows, weight, bias)
    if a is not None and b is not None:
        add_update_(y, rows, a, b, parts)
    return y.view(*x.shape[:-1], weight.shape[0])


@_nf4_linear.register_fake
def _(x: Tensor, codes: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    scale_codes: Tensor,
    group_scales: Tensor,
    group_start: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    offsets: PartOffsets | None = None,
) -> Tensor:
    """x W^T + bias, plus (x A^T) B^T on the rows of each adapted part. Inference only: it has no gradient.

    Args:
        x: (..., in), bf16, fp16 or fp32.
        codes, scale_codes, group_scales, group_start, offset: W (out, in), see `NF4Tensor`; decoded to the dtype of x.
        bias: (out,) or None.
        a: (adapted outputs * r, in), the stacked A in the compute dtype, or None without an adapter.
        b: (adapted rows, r), the stacked B in the compute dtype, already multiplied by alpha / r.
        offsets: where each adapted output lies.

    Returns:
        (..., out), same dtype.
    """
    parts = offsets or PartOffsets(())
    lists = (parts.out_starts, parts.out_stops, parts.a_starts, parts.b_starts)
    return _nf4_linear(x, codes, scale_codes, group_scales, group_start, offset, bias, a, b, *lists)
