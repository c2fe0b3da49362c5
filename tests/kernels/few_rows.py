"""What the tests of both products of few rows by a 4-bit W have in common: cases, their tensors, the exact result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from colora.kernels import fp4, fp4_few_rows, nf4, nf4_few_rows
from colora.kernels.few_rows_adapter import Adapter
from torch import Tensor

W = TypeVar("W", fp4.FP4Tensor, nf4.NF4Tensor)
CONFIGS = {
    fp4.FP4Tensor: fp4_few_rows.Config(outs=64, warps=4, together=False, chunks=4, buffers=2, registers=None, splits=1),
    nf4.NF4Tensor: nf4_few_rows.Config(outs=64, warps=4, together=False, blocks=4, buffers=2, registers=None, splits=1),
}
LAUNCHES = {fp4.FP4Tensor: fp4_few_rows.launch, nf4.NF4Tensor: nf4_few_rows.launch}


@dataclass(frozen=True)
class Case:
    """A product of x (rows, in_features) by as many stacked matrices as there are in `outs`.

    `parts`: (first column, last column + 1, first row of A, first row of B) of each adapted output.
    """

    rows: int
    outs: Sequence[int]
    in_features: int
    rank: int = 0
    parts: Sequence[tuple[int, int, int, int]] = ()
    bias: bool = False


@dataclass
class Operands(Generic[W]):
    x: Tensor
    weight: W
    bias: Tensor | None
    a: Tensor
    b: Tensor


def random_operands(
    case: Case, weight: W, dtype: torch.dtype, generator: torch.Generator, b_scale: float
) -> Operands[W]:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=generator.device)).to(dtype)

    return Operands(
        x=random(case.rows, case.in_features),
        weight=weight,
        bias=random(sum(case.outs)) if case.bias else None,
        a=random(len(case.parts) * case.rank, case.in_features, scale=0.05),
        b=random(sum(stop - start for start, stop, _, _ in case.parts), case.rank, scale=b_scale),
    )


def exact(case: Case, given: Operands[Any]) -> Tensor:
    """In double precision, of the weights that the trainer decodes."""
    x = given.x.double()
    y = x @ _decoded(given).double().T
    if given.bias is not None:
        y += given.bias.double()
    for start, stop, a, b in case.parts:
        u = x @ given.a[a : a + case.rank].double().T
        y[:, start:stop] += u @ given.b[b : b + stop - start].double().T
    return y


def _decoded(given: Operands[Any]) -> Tensor:
    """FP4 is exact in bf16, which has fewer digits and a larger range than the interpreter's fp16."""
    if isinstance(given.weight, fp4.FP4Tensor):
        return fp4.dequantize_reference(given.weight, torch.float32)
    return nf4.dequantize_reference(given.weight, given.x.dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit on a card. The interpreter's products are numpy's, which sums by where in a tile a row is: there a
    rounding of fp16 lies between them, and elements that cancel out."""
    if found.is_cuda:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-5 * float(expected.abs().max()))


def run(case: Case, given: Operands[Any], **changes: Any) -> Tensor:
    """By the kernel, cut up as in CONFIGS but for `changes`."""
    kind = type(given.weight)
    adapter = Adapter(given.a, given.b, case.parts) if case.parts else None
    return LAUNCHES[kind](given.x, given.weight, given.bias, adapter, replace(CONFIGS[kind], **changes))
