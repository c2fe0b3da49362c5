"""NF4 kernels: the product of few rows against cuBLAS in bf16, and quantise and dequantise against a copy's bandwidth.

Matrices are rotated through more than the L2 cache; times are of CUDA graphs, the median of their replays. Results are
checked against the decoded weights before anything is timed. `--tune` measures the configs first and writes the fastest
in the form of kernels/nf4_configs.json.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bandwidth import copy_gbs
from colora.kernels import nf4, nf4_tuning
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets
from colora.kernels.nf4_few_rows import MAX_ROWS, Config
from colora.kernels.nf4_linear import nf4_linear
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
BARS = {1: 2.0, 8: 2.0, 32: 1.5, 64: 1.0, 128: None}  # by rows: times cuBLAS' speed
WITH_ADAPTER = (8, 32, 64)  # rows
RANK = 16
ROTATED = 200e6  # bytes
BANDWIDTH_BAR = 0.85
LARGE = "8b.gate_up"  # the matrix to quantise and dequantise


def timed(run: Callable[[Any], Any], over: Sequence[Any], replays: int = 15) -> tuple[float, float]:
    """(median microseconds of one call, spread: the middle three fifths over it), calls of a graph over `over`."""
    run(over[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run(each) for each in over]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 2)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    del results
    times = sorted(a.elapsed_time(b) * 1e3 / len(over) for a, b in zip(marks[1:], marks[2:], strict=False))
    median, fifth = statistics.median(times), len(times) // 5
    return median, (times[-1 - fifth] - times[fifth]) / median


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    return [make() for _ in range(max(2, round(ROTATED / nbytes)))]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def cloned(stored: nf4.NF4Tensor) -> nf4.NF4Tensor:
    return nf4.NF4Tensor(*(tensor.clone() for tensor in stored.tensors()))


class Case:
    """One fused matrix, dense and in NF4, in copies beyond the L2 cache, and its adapter."""

    def __init__(self, name: str):
        outs, in_features = MATRICES[name]
        self.name, self.shape = name, (sum(outs), in_features)
        dense = random(*self.shape, scale=0.02)
        stacked = [nf4.quantize(part) for part in dense.split(outs)]
        stored = nf4.empty(outs, in_features, "cuda")
        for ours, theirs in zip(stored.tensors(), zip(*(part.tensors() for part in stacked), strict=True), strict=True):
            if ours is not stored.group_start:
                ours.copy_(torch.cat(theirs))
        self.dense = copies(dense.clone, dense.nbytes)
        self.stored = copies(lambda: cloned(stored), stored.nbytes)
        self.a, self.b = random(len(outs) * RANK, in_features, scale=0.05), random(self.shape[0], RANK, scale=0.2)
        parts, start = [], 0
        for index, out in enumerate(outs):
            rows = slice(start, start + out)
            parts.append(LoraPart("", rows, rows, slice(index * RANK, (index + 1) * RANK)))
            start += out
        self.parts, self.offsets = parts, PartOffsets(tuple(parts))

    def ours(self, x: Tensor, stored: nf4.NF4Tensor) -> Tensor:
        return nf4_linear(x, *stored.tensors())

    def adapted(self, x: Tensor, stored: nf4.NF4Tensor) -> Tensor:
        return nf4_linear(x, *stored.tensors(), None, self.a, self.b, self.offsets)

    def error(self, x: Tensor, ours: Tensor, adapted: bool) -> float:
        """Relative, against the decoded weights in fp32."""
        true = x.float() @ nf4.dequantize_reference(self.stored[0], torch.bfloat16).float().T
        for part in self.parts if adapted else ():
            true[:, part.out] += x.float() @ self.a[part.a].float().T @ self.b[part.b].float().T
        return ((ours.float() - true).norm() / true.norm()).item()


def measure(case: Case, rows: int, bandwidth: float, report: Report) -> None:
    x = random(rows, case.shape[1])
    error = case.error(x, case.ours(x, case.stored[0]), adapted=False)
    assert error < 4e-3, f"{case.name} rows {rows}: relative error {error:.5f}"
    ours, spread = timed(lambda stored: case.ours(x, stored), case.stored)
    cublas, _ = timed(lambda dense: F.linear(x, dense), case.dense)
    more: dict[str, Any] = {}
    if rows in WITH_ADAPTER:
        adapted_error = case.error(x, case.adapted(x, case.stored[0]), adapted=True)
        assert adapted_error < 6e-3, f"{case.name} rows {rows} with the adapter: relative error {adapted_error:.5f}"
        more["microseconds_with_adapter"] = round(timed(lambda stored: case.adapted(x, stored), case.stored)[0], 2)
    if rows <= MAX_ROWS:
        more["config"] = list(vars(nf4_tuning.chosen(x.device, case.shape, rows)).values())
    floor = case.stored[0].nbytes / bandwidth * 1e6
    bar = {} if BARS[rows] is None else {"bar": BARS[rows], "bar_is": "times cuBLAS' speed in bf16, same run"}
    report.add(
        f"nf4.linear.{case.name}.rows{rows}",
        cublas / ours,
        "x",
        "higher",
        **bar,
        microseconds=round(ours, 2),
        peers={"cublas_bf16_microseconds": round(cublas, 2)},
        share_of_bandwidth_bound=round(floor / ours, 3),
        spread=round(spread, 3),
        relative_error=round(error, 5),
        **more,
    )


def measure_passes(case: Case, bandwidth: float, report: Report) -> None:
    """Quantise and dequantise, as GB/s of the bytes that have to be read and written."""
    stored, dense = case.stored[0], case.dense[0]
    assert torch.equal(nf4.dequantize(stored, torch.bfloat16), nf4.dequantize_reference(stored, torch.bfloat16))
    out = torch.empty_like(dense)
    microseconds, spread = timed(lambda each: nf4.dequantize(each, torch.bfloat16, out), case.stored)
    report.add(
        "nf4.dequantise",
        (stored.nbytes + dense.nbytes) / microseconds / 1e3,
        "GB/s",
        "higher",
        bar=round(BANDWIDTH_BAR * bandwidth / 1e9),
        bar_is=f"{BANDWIDTH_BAR:.0%} of the copy's bandwidth, same run",
        microseconds=round(microseconds, 1),
        spread=round(spread, 3),
    )
    for ours, plain in zip(nf4.quantize_blocks(dense), nf4.quantize_blocks_reference(dense), strict=True):
        assert torch.equal(ours, plain)
    microseconds, spread = timed(nf4.quantize_blocks, case.dense)
    report.add(
        "nf4.quantise",
        (stored.codes.nbytes + 4 * stored.scale_codes.numel() + dense.nbytes) / microseconds / 1e3,
        "GB/s",
        "higher",
        microseconds=round(microseconds, 1),
        spread=round(spread, 3),
    )


def tune(file: Path) -> None:
    """Measure every candidate for the matrices here and write the fastest as a table of this kind of GPU."""

    def show(shape: tuple[int, int], rows: int, times: dict[Config, float]) -> None:
        ordered = sorted(times.items(), key=lambda item: item[1])
        shown = "  ".join(f"{microseconds:.2f} {list(vars(config).values())}" for config, microseconds in ordered[:3])
        print(f"tuned {shape[0]}x{shape[1]} rows {rows:3}: {shown}  worst {ordered[-1][1]:.2f}", flush=True)

    shapes = [(sum(outs), in_features) for outs, in_features in MATRICES.values()]
    table = nf4_tuning.TUNING.tune(shapes, torch.bfloat16, torch.device("cuda", 0), report=show)
    file.write_text(json.dumps({torch.cuda.get_device_name(): table}, indent=1))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tune", type=Path, help="where the table of the fastest configs goes")
    options.add_argument("--matrices", nargs="+", choices=list(MATRICES), default=list(MATRICES))
    options.add_argument("--rows", nargs="+", type=int, choices=list(BARS), default=list(BARS))
    arguments = options.parse_args()
    report = Report("nf4", arguments)
    torch.manual_seed(0)
    if arguments.tune:
        tune(arguments.tune)
    bandwidth = copy_gbs() * 1e9  # not in a graph, where a copy has a node of its own kind, which is slower
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    failed: list[Exception] = []
    for name in arguments.matrices:
        case = Case(name)
        jobs = [partial(measure, case, rows, bandwidth, report) for rows in arguments.rows]
        if name == LARGE:
            jobs.append(partial(measure_passes, case, bandwidth, report))
        for job in jobs:
            try:
                job()
            except Exception as error:  # it is raised below: the other figures are worth having
                print(f"FAILED {name}: {error}", flush=True)
                failed.append(error)
        report.write()  # what there is, should the time run out
    print(report.write())
    if failed:
        raise ExceptionGroup("some cases failed", failed)


if __name__ == "__main__":
    main()
