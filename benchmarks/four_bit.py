"""What the benchmarks of the 4-bit formats share: the matrices, a case's check and times, tuning, dequantising."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bandwidth import copy_gbs
from colora.kernels.few_rows_tuning import Tuning
from colora.kernels.lora_add import LoraPart
from colora.kernels.lora_linear import PartOffsets
from common import Report
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
WITH_ADAPTER = (8, 32, 64, 128)  # rows
RANK = 16
ROTATED = 200e6  # bytes
BANDWIDTH_BAR = 0.85
LARGE = "8b.gate_up"  # the matrix to quantise and dequantise


@dataclass(frozen=True)
class Format:
    """A 4-bit format.

    Attributes:
        name: that its figures begin with.
        kernels: its module in colora.kernels, with `quantize`, `dequantize` and `dequantize_reference`.
        linear: its product, with an adapter or without.
        tuning: of its kernel for few rows.
        max_rows: of that kernel.
        stored: a dense matrix and the rows of the projections fused in it -> the quantised one.
    """

    name: str
    kernels: Any
    linear: Callable[..., Tensor]
    tuning: Tuning[Any]
    max_rows: int
    stored: Callable[[Tensor, Sequence[int]], Any]


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
    """One fused matrix, dense and in a 4-bit format, in copies beyond the L2 cache, and its adapter."""

    def __init__(self, form: Format, name: str):
        outs, in_features = MATRICES[name]
        self.form, self.name, self.shape = form, name, (sum(outs), in_features)
        dense = random(*self.shape, scale=0.02)
        stored = form.stored(dense, outs)
        self.dense = [dense.clone() for _ in range(_copies(dense.nbytes))]
        self.stored = [
            type(stored)(*(tensor.clone() for tensor in stored.tensors())) for _ in range(_copies(stored.nbytes))
        ]
        self.a, self.b = random(len(outs) * RANK, in_features, scale=0.05), random(self.shape[0], RANK, scale=0.2)
        self.parts, start = [], 0
        for index, out in enumerate(outs):
            rows = slice(start, start + out)
            self.parts.append(LoraPart("", rows, rows, slice(index * RANK, (index + 1) * RANK)))
            start += out
        self.offsets = PartOffsets(tuple(self.parts))

    def ours(self, x: Tensor, stored: Any) -> Tensor:
        return self.form.linear(x, *stored.tensors())

    def adapted(self, x: Tensor, stored: Any) -> Tensor:
        return self.form.linear(x, *stored.tensors(), None, self.a, self.b, self.offsets)

    def error(self, x: Tensor, ours: Tensor, adapted: bool) -> float:
        """Relative, against the decoded weights in fp32."""
        true = x.float() @ self.form.kernels.dequantize_reference(self.stored[0], torch.bfloat16).float().T
        for part in self.parts if adapted else ():
            true[:, part.out] += x.float() @ self.a[part.a].float().T @ self.b[part.b].float().T
        return relative(ours, true)


def _copies(nbytes: int) -> int:
    return max(2, round(ROTATED / nbytes))


def relative(ours: Tensor, true: Tensor) -> float:
    return ((ours.float() - true).norm() / true.norm()).item()


def measure(case: Case, rows: int, bandwidth: float, report: Report) -> None:
    """The product of so many rows against cuBLAS in bf16."""
    x, form = random(rows, case.shape[1]), case.form
    error = case.error(x, case.ours(x, case.stored[0]), adapted=False)
    assert error < 4e-3, f"{case.name} rows {rows}: relative error {error:.5f}"
    ours, spread = timed(lambda stored: case.ours(x, stored), case.stored)
    cublas, _ = timed(lambda dense: F.linear(x, dense), case.dense)
    more: dict[str, Any] = {}
    if rows in WITH_ADAPTER:
        adapted_error = case.error(x, case.adapted(x, case.stored[0]), adapted=True)
        assert adapted_error < 6e-3, f"{case.name} rows {rows} with the adapter: relative error {adapted_error:.5f}"
        more["microseconds_with_adapter"] = round(timed(lambda stored: case.adapted(x, stored), case.stored)[0], 2)
    if rows <= form.max_rows:
        more["config"] = list(vars(form.tuning.chosen(x.device, case.shape, rows)).values())
    if rows in BARS:
        more |= {"bar": BARS[rows], "bar_is": "times cuBLAS' speed in bf16, same run"}
    floor = case.stored[0].nbytes / bandwidth * 1e6
    report.add(
        f"{form.name}.linear.{case.name}.rows{rows}",
        cublas / ours,
        "x",
        "higher",
        microseconds=round(ours, 2),
        peers={"cublas_bf16_microseconds": round(cublas, 2)},
        share_of_bandwidth_bound=round(floor / ours, 3),
        spread=round(spread, 3),
        relative_error=round(error, 5),
        **more,
    )


def measure_dequantise(case: Case, bandwidth: float, report: Report) -> None:
    """As GB/s of the bytes that have to be read and written."""
    kernels, stored, dense = case.form.kernels, case.stored[0], case.dense[0]
    assert torch.equal(kernels.dequantize(stored, torch.bfloat16), kernels.dequantize_reference(stored, torch.bfloat16))
    out = torch.empty_like(dense)
    microseconds, spread = timed(lambda each: kernels.dequantize(each, torch.bfloat16, out), case.stored)
    report.add(
        f"{case.form.name}.dequantise",
        (stored.nbytes + dense.nbytes) / microseconds / 1e3,
        "GB/s",
        "higher",
        bar=round(BANDWIDTH_BAR * bandwidth / 1e9),
        bar_is=f"{BANDWIDTH_BAR:.0%} of the copy's bandwidth, same run",
        microseconds=round(microseconds, 1),
        spread=round(spread, 3),
    )


def tune(form: Format, file: Path) -> None:
    """Measure every candidate for the matrices here and write the fastest as a table of this kind of GPU."""

    def show(shape: tuple[int, int], rows: int, times: dict[Any, float]) -> None:
        ordered = sorted(times.items(), key=lambda item: item[1])
        shown = "  ".join(f"{microseconds:.2f} {list(vars(config).values())}" for config, microseconds in ordered[:3])
        print(f"tuned {shape[0]}x{shape[1]} rows {rows:3}: {shown}  worst {ordered[-1][1]:.2f}", flush=True)

    shapes = [(sum(outs), in_features) for outs, in_features in MATRICES.values()]
    table = form.tuning.tune(shapes, torch.bfloat16, torch.device("cuda", 0), report=show)
    file.write_text(json.dumps({torch.cuda.get_device_name(): table}, indent=1))


def add_options(options: argparse.ArgumentParser, rows: Sequence[int]) -> None:
    options.add_argument("--tune", type=Path, help="where the table of the fastest configs goes")
    options.add_argument("--matrices", nargs="+", choices=list(MATRICES), default=list(MATRICES))
    options.add_argument("--rows", nargs="+", type=int, choices=list(rows), default=list(rows))


def measure_all(
    form: Format, arguments: argparse.Namespace, report: Report, measure_quantise: Callable[[Case, Report], None]
) -> None:
    """Every figure of the GPU; one that fails costs no other, and the file is written after each matrix."""
    torch.manual_seed(0)
    if arguments.tune:
        tune(form, arguments.tune)
    bandwidth = copy_gbs() * 1e9  # not in a graph, where a copy has a node of its own kind, which is slower
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    failed: list[Exception] = []
    for name in arguments.matrices:
        case = Case(form, name)
        jobs = [partial(measure, case, rows, bandwidth, report) for rows in arguments.rows]
        if name == LARGE:
            jobs += [partial(measure_dequantise, case, bandwidth, report), partial(measure_quantise, case, report)]
        for job in jobs:
            try:
                job()
            except Exception as error:  # it is raised below: the other figures are worth having
                print(f"FAILED {name}: {error}", flush=True)
                failed.append(error)
    if failed:
        raise ExceptionGroup("some cases failed", failed)
