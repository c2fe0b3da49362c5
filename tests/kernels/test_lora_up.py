"""The kernel against the plain formulation, interpreted or on a card, where a CUDA graph replays it too."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets, lora_linear
from torch import Tensor

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
needs_kernel = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if ON_CARD else "cpu"
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4}  # of norms: two roundings


@dataclass(frozen=True)
class Case:
    """A fused projection of `outs` columns a part, of which those numbered `adapted` have an adapter."""

    rows: int
    outs: Sequence[int]
    in_features: int
    rank: int
    adapted: Sequence[int]
    with_bias: bool = False


CASES = {
    "qkv_with_bias": Case(5, (192, 64, 64), 96, 16, (0, 1, 2), True),
    "one_of_two_parts": Case(1, (128, 128), 256, 8, (1,)),
    "q_and_v": Case(33, (128, 64, 64), 64, 32, (0, 2)),
    "odd_rank": Case(17, (64, 64), 64, 5, (0, 1)),
    "programs_of_more_warps": Case(65, (64, 64), 64, 16, (0, 1)),
    "prefill": Case(300, (256,), 130, 16, (0,), True),
}


@dataclass
class Operands:
    """Of `lora_linear`: W and then A in one matrix."""

    x: Tensor
    stacked: Tensor
    b: Tensor
    bias: Tensor | None
    offsets: PartOffsets

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype) -> "Operands":
        generator = torch.Generator(DEVICE).manual_seed(0)

        def random(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)

        parts, b_rows = [], 0
        for index, part in enumerate(case.adapted):
            start, width = sum(case.outs[:part]), case.outs[part]
            ranks = slice(index * case.rank, (index + 1) * case.rank)
            parts.append(LoraPart("", slice(start, start + width), slice(b_rows, b_rows + width), ranks))
            b_rows += width
        out = sum(case.outs)
        return cls(
            x=random(case.rows, case.in_features, scale=1.0),
            stacked=random(out + len(parts) * case.rank, case.in_features, scale=0.1),
            b=random(b_rows, case.rank, scale=0.3),
            bias=random(out, scale=1.0) if case.with_bias else None,
            offsets=PartOffsets(tuple(parts)),
        )

    @property
    def out(self) -> int:
        return self.stacked.shape[0] - len(self.offsets.a_starts) * self.b.shape[1]

    def exact(self) -> Tensor:
        """(rows, out) in double precision, by the products apart."""
        x, w, a, b = (t.double() for t in (self.x, self.stacked[: self.out], self.stacked[self.out :], self.b))
        return lora_linear(x, w, None if self.bias is None else self.bias.double(), a, b, self.offsets)

    def assert_close(self, ours: Tensor) -> None:
        exact = self.exact()
        assert (ours.double() - exact).norm() / exact.norm() < TOLERANCE[ours.dtype]


@needs_kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_adds_the_update_to_the_product(case: Case) -> None:
    from colora.kernels.lora_up import fits, lora_up

    operands = Operands.random(case, torch.float16)  # of bf16 the interpreter multiplies the bits
    offsets = operands.offsets
    assert fits(torch.float16, operands.b.shape[1], offsets.out_starts, offsets.out_stops)
    assert not fits(torch.float16, 257, offsets.out_starts, offsets.out_stops)
    both = operands.x @ operands.stacked.T
    starts = (offsets.out_starts, offsets.out_stops, offsets.a_starts, offsets.b_starts)
    operands.assert_close(lora_up(both, operands.bias, operands.b, operands.out, *starts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_operator_and_its_replay_equal_separate_products(case: Case, dtype: torch.dtype) -> None:
    """A replay on new inputs gives theirs."""
    operands = Operands.random(case, dtype)
    stacked, out = operands.stacked, operands.out

    def run() -> Tensor:
        weights = (stacked[:out], operands.bias, stacked[out:], operands.b)
        return lora_linear(operands.x, *weights, operands.offsets, stacked)

    operands.assert_close(run())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        operands.x.copy_(operands.x.flip(0) + 1)
        graph.replay()
        operands.assert_close(captured)
