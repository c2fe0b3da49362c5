"""Logits of the head in fp32, without an fp32 copy of the head.

A product of two 16-bit numbers is exact in fp32 and the matrix units sum in fp32; what loses digits is rounding the
*result*: a bf16 logit of 16 is off by up to 0.06, and so is its log-prob. That part of the gap between engine and
trainer costs nothing to avoid (ScaleRL, arXiv 2510.13786, trains with fp32 logits for this reason).
"""

import torch
from torch import Tensor


def head_logits(hidden: Tensor, head: Tensor, fp32: bool = True) -> Tensor:
    """hidden @ head.T in fp32.

    Args:
        hidden: (tokens, hidden_size).
        head: (vocab, hidden_size), same dtype.
        fp32: keep the sums as they are; False: round them to the dtype of the operands first, as a plain linear does.

    Returns:
        (tokens, vocab) fp32. Not differentiable: callers write the backward themselves.
    """
    if not fp32 or hidden.dtype == torch.float32:
        return (hidden @ head.T).float()
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return hidden.float() @ head.float().T
