"""Elementwise references, fused by the compiler where that pays."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def fused_on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` as it is on the CPU and compiled, for any number of tokens, where its first tensor is on a GPU.

    A chain of elementwise operations is bound by memory: one at a time each reads and writes everything. Compiled, the
    chain rounds to the compute dtype only at its end, so that bf16 results may differ from the plain ones by 1 ulp.
    """

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        return compiled()(*args, **kwargs) if first.is_cuda else function(*args, **kwargs)

    return run
