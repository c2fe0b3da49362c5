"""What `benchmarks/bandwidth.py` measures: a file an op, whose `cases(tokens)` yields its `Case`s."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """A function of the case's inputs, or of what `prepare` makes of them before the clock runs."""

    run: Callable[..., Outputs]
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs.

    Attributes:
        figure: the figures' names are FIGURE.fwd_gbs.SIZE and FIGURE.bwd_gbs.SIZE.
        inputs: of every implementation; the tensors among them that require a gradient are leaves.
        implementations: `ours`, `reference` (plain torch) and the peers.
        forward_bytes, backward_bytes: what has to be read and written, whoever does it.
        tolerance: of the relative error (of norms) of outputs and gradients against the reference in fp32.
        in_place: the op overwrites inputs, so that a graph for backward is built on copies.
    """

    figure: str
    inputs: tuple[Any, ...]
    implementations: dict[str, Implementation]
    forward_bytes: int
    backward_bytes: int
    tolerance: float = 6e-3
    in_place: bool = False
