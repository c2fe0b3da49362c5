"""FP4 (kernels/fp4.py): its quantisation error against NF4's, and its kernels against cuBLAS in bf16.

The errors are relative, root mean square over 4096 x 4096 weights, and run on a CPU too: Gaussian weights; weights of
Student's t distribution with 5 degrees of freedom (heavy tails); weights whose inputs have scales of their own (log-
normal, sigma 0.5); and Gaussian ones of which one input in a hundred is ten times as large (outlier channels).

On a GPU, the product of few rows and dequantising: matrices are rotated through more than the L2 cache, times are of
CUDA graphs, the median of their replays, and results are checked against the decoded weights before anything is timed.
`--tune` measures the configs first and writes the fastest in the form of kernels/fp4_configs.json.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bandwidth import copy_gbs
from colora.kernels import fp4, nf4
from colora.kernels.fp4_linear import fp4_linear
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets
from common import Report, parser
from torch import Tensor

MATRICES = {
    "4b.qkv": ((4096, 1024, 1024), 2560),
    "4b.o": ((2560,), 4096),
    "4b.gate_up": ((9728, 9728), 2560),
    "4b.down": ((2560,), 9728),
    "8b.qkv": ((4096, 1024, 1024), 4096),
    "8b.o": ((4096,), 4096),
    "8b.gate_up": ((12288, 12288), 4096),
    "8b.down": ((4096,), 12288),
}
BARS = {1: 2.0, 8: 2.0, 32: 1.5, 64: 1.0}  # by rows: times cuBLAS' speed
WITH_ADAPTER = (8, 32)  # rows
RANK = 16
ROTATED = 200e6  # bytes
BANDWIDTH_BAR = 0.85
LARGE = "8b.gate_up"  # the matrix to quantise and dequantise
SIZE = 4096  # of the matrices whose quantisation error is measured


def distributions() -> dict[str, Tensor]:
    """Weights (SIZE, SIZE) fp32, always the same."""
    torch.manual_seed(0)
    gaussian = torch.randn(SIZE, SIZE) * 0.02
    outliers = torch.where(torch.rand(SIZE) < 0.01, 10.0, 1.0)
    return {
        "gaussian": gaussian,
        "student_t5": torch.distributions.StudentT(5.0).sample((SIZE, SIZE)) * 0.02,
        "lognormal_inputs": gaussian * torch.exp(0.5 * torch.randn(SIZE)),
        "outlier_inputs": gaussian * outliers,
    }


def measure_errors(report: Report) -> None:
    for name, weight in distributions().items():
        fp4_error = _relative(fp4.dequantize(fp4.quantize(weight), torch.float32), weight)
        nf4_error = _relative(nf4.dequantize(nf4.quantize(weight), torch.float32), weight)
        report.add(f"nf4.quantisation_error.{name}", nf4_error, "relative RMS", "lower")
        report.add(
            f"fp4.quantisation_error.{name}", fp4_error, "relative RMS", "lower", peers={"nf4": round(nf4_error, 5)}
        )


def _relative(ours: Tensor, true: Tensor) -> float:
    return ((ours.float() - true).norm() / true.norm()).item()


def timed(run: Callable[[Any], Any], over: Sequence[Any], replays: int = 15) -> tuple[float, float]:
    """(median microseconds of one call, spread: the middle three fifths over it), calls of a graph over `over`."""
    run(over[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run(each) for each in over]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 3)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    del results
    times = sorted(a.elapsed_time(b) * 1e3 / len(over) for a, b in zip(marks[2:], marks[3:], strict=False))
    median, fifth = statistics.median(times), len(times) // 5
    return median, (times[-1 - fifth] - times[fifth]) / median


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


class Case:
    """One fused matrix, dense and in FP4, in copies beyond the L2 cache, and its adapter."""

    def __init__(self, name: str):
        outs, in_features = MATRICES[name]
        self.name, self.shape = name, (sum(outs), in_features)
        dense = random(*self.shape, scale=0.02)
        stored = fp4.quantize(dense)
        self.dense = [dense.clone() for _ in range(max(2, round(ROTATED / dense.nbytes)))]
        copies = max(2, round(ROTATED / stored.nbytes))
        self.stored = [fp4.FP4Tensor(*(tensor.clone() for tensor in stored.tensors())) for _ in range(copies)]
        self.a, self.b = random(len(outs) * RANK, in_features, scale=0.05), random(self.shape[0], RANK, scale=0.2)
        self.parts, start = [], 0
        for index, out in enumerate(outs):
            rows = slice(start, start + out)
            self.parts.append(LoraPart("", rows, rows, slice(index * RANK, (index + 1) * RANK)))
            start += out
        self.offsets = PartOffsets(tuple(self.parts))

    def ours(self, x: Tensor, stored: fp4.FP4Tensor) -> Tensor:
        return fp4_linear(x, *stored.tensors())

    def adapted(self, x: Tensor, stored: fp4.FP4Tensor) -> Tensor:
        return fp4_linear(x, *stored.tensors(), None, self.a, self.b, self.offsets)

    def error(self, x: Tensor, ours: Tensor, adapted: bool) -> float:
        """Relative, against the decoded weights in fp32."""
        true = x.float() @ fp4.dequantize_reference(self.stored[0], torch.float32).T
        for part in self.parts if adapted else ():
            true[:, part.out] += x.float() @ self.a[part.a].float().T @ self.b[part.b].float().T
        return _relative(ours, true)


def measure(case: Case, rows: int, bandwidth: float, report: Report) -> None:
    from colora.kernels.fp4_tuning import chosen

    x = random(rows, case.shape[1])
    error = case.error(x, case.ours(x, case.stored[0]), adapted=False)
    assert error < 4e-3, f"{case.name} rows {rows}: relative error {error:.5f}"
    ours, spread = timed(lambda stored: case.ours(x, stored), case.stored)
    cublas, _ = timed(lambda dense: F.linear(x, dense), case.dense)
    more = {}
    if rows in WITH_ADAPTER:
        adapted_error = case.error(x, case.adapted(x, case.stored[0]), adapted=True)
        assert adapted_error < 6e-3, f"{case.name} rows {rows} with the adapter: relative error {adapted_error:.5f}"
        more["microseconds_with_adapter"] = round(timed(lambda stored: case.adapted(x, stored), case.stored)[0], 2)
    floor = case.stored[0].nbytes / bandwidth * 1e6
    report.add(
        f"fp4.linear.{case.name}.rows{rows}",
        cublas / ours,
        "x",
        "higher",
        bar=BARS[rows],
        bar_is="times cuBLAS' speed in bf16, same run",
        microseconds=round(ours, 2),
        peers={"cublas_bf16_microseconds": round(cublas, 2)},
        share_of_bandwidth_bound=round(floor / ours, 3),
        spread=round(spread, 3),
        relative_error=round(error, 5),
        config=list(vars(chosen(x.device, case.shape, rows)).values()),
        **more,
    )


def measure_passes(case: Case, bandwidth: float, report: Report) -> None:
    """Dequantising, as GB/s of the bytes that have to be read and written; quantising, as weights a second."""
    stored, dense = case.stored[0], case.dense[0]
    assert torch.equal(fp4.dequantize(stored, torch.bfloat16), fp4.dequantize_reference(stored, torch.bfloat16))
    out = torch.empty_like(dense)
    microseconds, spread = timed(lambda each: fp4.dequantize(each, torch.bfloat16, out), case.stored)
    report.add(
        "fp4.dequantise",
        (stored.nbytes + dense.nbytes) / microseconds / 1e3,
        "GB/s",
        "higher",
        bar=round(BANDWIDTH_BAR * bandwidth / 1e9),
        bar_is=f"{BANDWIDTH_BAR:.0%} of the copy's bandwidth, same run",
        microseconds=round(microseconds, 1),
        spread=round(spread, 3),
    )
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fp4.quantize(dense)
    stop.record()
    stop.synchronize()
    report.add("fp4.quantise", dense.numel() / start.elapsed_time(stop) / 1e6, "1e9 weights/s", "higher")


def tune(file: Path) -> None:
    """Measure every candidate for the matrices here and write the fastest as a table of this kind of GPU."""
    from colora.kernels.fp4_few_rows import Config
    from colora.kernels.fp4_tuning import TUNING

    def show(shape: tuple[int, int], rows: int, times: dict[Config, float]) -> None:
        ordered = sorted(times.items(), key=lambda item: item[1])
        shown = "  ".join(f"{microseconds:.2f} {list(vars(config).values())}" for config, microseconds in ordered[:3])
        print(f"tuned {shape[0]}x{shape[1]} rows {rows:3}: {shown}  worst {ordered[-1][1]:.2f}", flush=True)

    shapes = [(sum(outs), in_features) for outs, in_features in MATRICES.values()]
    table = TUNING.tune(shapes, torch.bfloat16, torch.device("cuda", 0), report=show)
    file.write_text(json.dumps({torch.cuda.get_device_name(): table}, indent=1))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tune", type=Path, help="where the table of the fastest configs goes")
    options.add_argument("--matrices", nargs="+", choices=list(MATRICES), default=list(MATRICES))
    options.add_argument("--rows", nargs="+", type=int, choices=list(BARS), default=list(BARS))
    options.add_argument("--errors", action="store_true", help="the quantisation errors alone, as on a CPU")
    arguments = options.parse_args()
    report = Report("fp4", arguments)
    measure_errors(report)
    if torch.cuda.is_available() and not arguments.errors:
        torch.manual_seed(0)
        if arguments.tune:
            tune(arguments.tune)
        bandwidth = copy_gbs() * 1e9  # not in a graph, where a copy has a node of its own kind, which is slower
        print(f"copy: {bandwidth / 1e9:.0f} GB/s")
        for name in arguments.matrices:
            case = Case(name)
            for rows in arguments.rows:
                measure(case, rows, bandwidth, report)
            if name == LARGE:
                measure_passes(case, bandwidth, report)
            report.write()  # what there is, should the time run out
    print(report.write())


if __name__ == "__main__":
    main()
