"""`colora::lora_linear`: correctness, and its time against the frozen product alone and against separate products.

Weights are rotated through more than the L2 cache; times are of CUDA graphs.
"""

import itertools

import torch
import torch.nn.functional as F
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets, lora_linear
from common import Report, parser
from torch import Tensor
from triton.testing import do_bench_cudagraph

MATRICES = {
    "4b.qkv": ((4096, 1024, 1024), 2560),
    "4b.o": ((2560,), 4096),
    "4b.gate_up": ((9728, 9728), 2560),
    "4b.down": ((2560,), 9728),
}
ROWS = (1, 8, 32, 128, 2048)
RANK = 16
BANDWIDTH = 4.3e12  # bytes/s of a device-to-device copy on an H200


class Case:
    """One fused matrix with its adapter, in copies beyond the L2 cache, and its inputs."""

    def __init__(self, name: str, rows: int):
        outs, in_features = MATRICES[name]
        self.name, self.rows, self.out, rank_rows = name, rows, sum(outs), len(outs) * RANK
        copies = max(2, int(300e6 // (2 * self.out * in_features)))
        self.stacked = [self._random(self.out + rank_rows, in_features, scale=0.02) for _ in range(copies)]
        self.b = self._random(self.out, RANK, scale=0.2)
        self.x = self._random(rows, in_features, scale=1.0)
        parts, start = [], 0
        for index, out in enumerate(outs):
            rows_of = slice(start, start + out)
            parts.append(LoraPart("", rows_of, rows_of, slice(index * RANK, (index + 1) * RANK)))
            start += out
        self.offsets = PartOffsets(tuple(parts))

    @staticmethod
    def _random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

    def frozen(self, stacked: Tensor) -> Tensor:
        return F.linear(self.x, stacked[: self.out])

    def separate(self, stacked: Tensor) -> Tensor:
        """Base, A and each B as products of their own."""
        return lora_linear(self.x, stacked[: self.out], None, stacked[self.out :], self.b, self.offsets)

    def ours(self, stacked: Tensor) -> Tensor:
        return lora_linear(self.x, stacked[: self.out], None, stacked[self.out :], self.b, self.offsets, stacked)

    def exact(self, stacked: Tensor) -> Tensor:
        """In fp32."""
        x, w, b = self.x.float(), stacked.float(), self.b.float()
        return lora_linear(x, w[: self.out], None, w[self.out :], b, self.offsets)

    def microseconds(self, run) -> float:
        return do_bench_cudagraph(lambda: [run(stacked) for stacked in self.stacked], rep=20) / len(self.stacked) * 1e3


def measure(case: Case, report: Report) -> None:
    expected = case.exact(case.stacked[0])
    error = ((case.ours(case.stacked[0]).float() - expected).norm() / expected.norm()).item()
    assert error < 6e-3, f"{case.name} rows {case.rows}: relative error {error:.4f}"
    frozen = round(case.microseconds(case.frozen), 2)
    report.add(
        f"lora_linear.{case.name}.rows{case.rows}",
        case.microseconds(case.ours),
        "us",
        "lower",
        bar=frozen,
        bar_is="the frozen product alone by cuBLAS, same run",
        peers={"frozen": frozen, "separate_products": round(case.microseconds(case.separate), 2)},
        floor=round(case.stacked[0].nbytes / BANDWIDTH * 1e6, 2),
        relative_error=round(error, 5),
    )


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report = Report("lora_linear", arguments)
    for name, rows in itertools.product(MATRICES, ROWS):
        measure(Case(name, rows), report)
    print(report.write())


if __name__ == "__main__":
    main()
