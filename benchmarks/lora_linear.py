"""`kernels.lora_few_rows` against cuBLAS: correctness, time against the frozen product alone and against separate products.

Weights are rotated through more than the L2 cache; times are of CUDA graphs. `--tune` tries every configuration.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_few_rows import lora_linear_few_rows
from colora.kernels.lora_linear import PartOffsets
from common import Report, parser
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench_cudagraph

MATRICES = {
    "4b.qkv": ((4096, 1024, 1024), 2560),
    "4b.o": ((2560,), 4096),
    "4b.gate_up": ((9728, 9728), 2560),
    "4b.down": ((2560,), 9728),
    "8b.qkv": ((4096, 1024, 1024), 4096),
    "8b.gate_up": ((12288, 12288), 4096),
    "8b.down": ((4096,), 12288),
}
ROWS = (1, 8, 32, 64, 128)
RANK = 16
CONFIGS = list(itertools.product((16, 32, 64, 128), (64, 128, 256), (4,), (3, 5)))  # BLOCK_N, BLOCK_K, warps, stages
BANDWIDTH = 4.3e12  # bytes/s of a device-to-device copy on an H200
Config = tuple[int, int, int, int]


class Case:
    """One fused matrix with its adapter, in copies beyond the L2 cache, and its inputs."""

    def __init__(self, name: str, rows: int):
        outs, in_features = MATRICES[name]
        self.name, self.rows = name, rows
        copies = max(2, int(300e6 // (2 * sum(outs) * in_features)))
        self.weights = [self._random(sum(outs), in_features, scale=0.02) for _ in range(copies)]
        self.a = self._random(len(outs) * RANK, in_features, scale=0.02)
        self.b = self._random(sum(outs), RANK, scale=0.2)
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

    def frozen(self, weight: Tensor) -> Tensor:
        return F.linear(self.x, weight)

    def separate(self, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Base, A and each B as products of their own."""
        x, a, b, o = self.x.to(dtype), self.a.to(dtype), self.b.to(dtype), self.offsets
        y, down = F.linear(x, weight.to(dtype)), x @ a.T
        for out, stop, a_start in zip(o.out_starts, o.out_stops, o.a_starts, strict=True):
            y[:, out:stop].addmm_(down[:, a_start : a_start + RANK], b[out:stop].T)
        return y

    def fused(self, weight: Tensor, config: Config | None = None) -> Tensor:
        o = self.offsets
        return lora_linear_few_rows(
            self.x, weight, None, self.a, self.b, o.out_starts, o.out_stops, o.a_starts, o.b_starts, config
        )

    def microseconds(self, run, **options) -> float:
        graph = do_bench_cudagraph(lambda: [run(weight, **options) for weight in self.weights], rep=20)
        return graph / len(self.weights) * 1e3


def measure(case: Case, report: Report) -> None:
    expected = case.separate(case.weights[0], torch.float32)
    error = ((case.fused(case.weights[0]).float() - expected).norm() / expected.norm()).item()
    assert error < 6e-3, f"{case.name} rows {case.rows}: relative error {error:.4f}"
    frozen = round(case.microseconds(case.frozen), 2)
    report.add(
        f"lora_linear.{case.name}.rows{case.rows}",
        case.microseconds(case.fused),
        "us",
        "lower",
        bar=frozen,
        bar_is="the frozen product alone by cuBLAS, same run",
        peers={"frozen": frozen, "separate_products": round(case.microseconds(case.separate), 2)},
        floor=round(case.weights[0].nbytes / BANDWIDTH * 1e6, 2),
        relative_error=round(error, 5),
    )


def usable(rows: int) -> list[Config]:
    return [config for config in CONFIGS if rows <= 64 or config[0] >= 64]


def compile_all(what: tuple[str, int]) -> None:
    """Run every configuration once: it is in Triton's cache then."""
    case = Case(*what)
    for config in usable(case.rows):
        with suppress(OutOfResources):
            case.fused(case.weights[0], config)


def tune(case: Case) -> None:
    found = []
    for config in usable(case.rows):
        with suppress(OutOfResources):
            found.append((case.microseconds(case.fused, config=config), config))
    best = "  ".join(f"{time:.1f}:{config}" for time, config in sorted(found)[:4])
    print(f"   TUNE {case.name} rows {case.rows} frozen {case.microseconds(case.frozen):.1f} | {best}", flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tune", action="store_true")
    arguments = options.parse_args()
    report = Report("lora_linear", arguments)
    cases = list(itertools.product(MATRICES, ROWS))
    if arguments.tune:
        cases = [(name, rows) for name, rows in cases if name.startswith("4b") and rows in (8, 32, 128)]
        with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_all, cases))
    for name, rows in cases:
        case = Case(name, rows)
        measure(case, report)
        if arguments.tune:
            tune(case)
    print(report.write())


if __name__ == "__main__":
    main()
