"""The ops that a policy is made of, as one value: the kernels where there are some, or the plain-torch references."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .attention import KeptAttention, packed_attention, packed_attention_reference
from .glu import glu, glu_reference
from .linear_logprob import linear_logprob
from .rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from .rope import rotate_qkv, rotate_qkv_reference
from .row_layout import Layout


@dataclass(frozen=True)
class Ops:
    """Functions with the arguments and results of those of the same names in this package's modules."""

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotate_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
    packed_attention: Callable[..., Tensor]
    glu: Callable[..., Tensor]
    linear_logprob: Callable[..., tuple[Tensor, Tensor | None]]
    reference: bool = False  # for what has a switch of its own: the adapter's update in a SharedLinear


def _add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, one_plus_weight: bool = False
) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm_reference(summed, weight, eps, one_plus_weight), summed


def _attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, kept: KeptAttention | None = None
) -> Tensor:
    return packed_attention_reference(q, k, v, layout, scale, window)


def _glu_reference(gate_up: Tensor, activation: str, overwrite: bool = False) -> Tensor:
    return glu_reference(gate_up, activation)


OPS: dict[str, Ops] = {
    "auto": Ops(rms_norm, add_rms_norm, rotate_qkv, packed_attention, glu, linear_logprob),
    "reference": Ops(
        rms_norm_reference,
        _add_rms_norm_reference,
        rotate_qkv_reference,
        _attention_reference,
        _glu_reference,
        partial(linear_logprob, reference=True),
        reference=True,
    ),
}
