"""The elementwise Triton kernels: GB/s forward and backward beside plain torch, compiled torch and Liger.

Times are medians of what the card needs, with a cold L2 cache: before each run the card is kept busy with clearing the
cache for longer than the host needs to launch the run. That holds for the peers as well, and for the roof, which is the
bandwidth of a device-to-device copy, measured in the same run. What the host needs is a fact of our rows.
Beside the JSON goes bandwidth.png: GB/s against the number of tokens.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import Report, parser
from kernel_cases import Case, Implementation
from plots import Panels, plot_panels
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

FOLDER = Path(__file__).parent / "kernel_cases"
OPS = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
SIZES = {"1k": 1024, "4k": 4096, "16k": 16384, "64k": 65536}
BAR, BAR_SIZE = 0.85, "16k"
COPIED = 2**30  # bytes of the roof's copy, read once and written once
CLEARED = 2**28  # bytes written to clear the L2 cache; over four times its size
CLEARS_PER_SECOND = 1e13 / CLEARED  # no card of today is so fast
REPEAT_SECONDS, FEWEST_REPEATS = 0.2, 10
MEASURED = "median of the card's time between events, cold L2, the card kept busy until the run was launched; peers too"


@dataclass(frozen=True)
class Time:
    """Milliseconds of the card, its spread (the middle three fifths over the median), microseconds of the host."""

    milliseconds: float
    spread: float
    launch_microseconds: float


def launch_seconds(run: Callable[[], Any]) -> float:
    """How long the host needs to launch `run`: the median of some launches on an idle card."""
    seconds = []
    for _ in range(15):
        torch.cuda.synchronize()
        started = perf_counter()
        run()
        seconds.append(perf_counter() - started)
    return median(seconds)


def timed(run: Callable[[], Any]) -> Time:
    """The card's time for `run`, which is called until the median is worth something."""
    cache = torch.empty(CLEARED, dtype=torch.int8, device="cuda")
    run()  # compiles
    launch = launch_seconds(run)
    clears = ceil(2 * launch * CLEARS_PER_SECOND) + 1

    def milliseconds(repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(clears):
                cache.zero_()
            started.record()
            run()
            ended.record()
            pairs.append((started, ended))
        torch.cuda.synchronize()
        return [started.elapsed_time(ended) for started, ended in pairs]

    milliseconds(3)
    begun = perf_counter()
    milliseconds(3)
    each = (perf_counter() - begun) / 3
    times = milliseconds(max(FEWEST_REPEATS, int(REPEAT_SECONDS / each)))
    low, middle, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
    return Time(middle, (high - low) / middle, 1e6 * launch)


def copy_gbs(moved: int = 2 * COPIED) -> float:
    """GB/s of a copy that reads and writes `moved` bytes altogether."""
    source = torch.empty(moved // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source)).milliseconds / 1e6


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves(inputs: Sequence[Any]) -> list[Tensor]:
    return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]


def run_with_graph(case: Case, implementation: Implementation, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs, differentiable in `inputs`, which keep their values."""
    # Of a clone the gradient is passed on as it is: a product with 1 would be a kernel more in the backward pass.
    given = [t.clone() if case.in_place and isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
    return tensors(implementation.run(*given))


def outputs_and_gradients(case: Case, name: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """In fp32; computed on copies of the inputs, in `dtype` where given."""
    inputs = []
    for given in case.inputs:
        if isinstance(given, Tensor):
            floating = dtype is not None and given.is_floating_point()
            given = given.detach().to(dtype if floating else given.dtype).requires_grad_(given.requires_grad)
        inputs.append(given)
    implementation = case.implementations[name]
    outputs = run_with_graph(case, implementation, implementation.prepare(*inputs))
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator, device="cuda").bfloat16().to(o.dtype) for o in outputs]
    return [t.float() for t in (*outputs, *torch.autograd.grad(outputs, leaves(inputs), grads))]


def check(case: Case) -> float:
    """The greatest relative error of an output or a gradient against the reference in fp32."""
    pairs = zip(
        outputs_and_gradients(case, "ours"), outputs_and_gradients(case, "reference", torch.float32), strict=True
    )
    error = max(((ours - exact).norm() / exact.norm()).item() for ours, exact in pairs)
    assert error < case.tolerance, f"{case.figure}: relative error {error:.5f} is over {case.tolerance}"
    return error


def forward_time(implementation: Implementation, case: Case) -> Time:
    # An op in place goes over its own output again and again: other values, the same work.
    inputs = implementation.prepare(*case.inputs)
    with torch.no_grad():
        return timed(lambda: implementation.run(*inputs))


def backward_time(implementation: Implementation, case: Case) -> Time:
    inputs = implementation.prepare(*case.inputs)
    outputs = run_with_graph(case, implementation, inputs)
    grads = [torch.randn_like(output) for output in outputs]
    return timed(lambda: torch.autograd.grad(outputs, leaves(inputs), grads, retain_graph=True))


def measure(case: Case, size: str, roof: float, report: Report) -> None:
    error = check(case)
    implementations = dict(case.implementations)
    reference = implementations["reference"]
    implementations["compiled"] = Implementation(torch.compile(reference.run), reference.prepare)
    passes = {"fwd": (forward_time, case.forward_bytes), "bwd": (backward_time, case.backward_bytes)}
    for direction, (measure_time, moved) in passes.items():
        times = {name: measure_time(implementation, case) for name, implementation in implementations.items()}
        gbs = {name: moved / time.milliseconds / 1e6 for name, time in times.items()}
        bar = {
            "bar": round(max(BAR * roof, gbs.get("liger", 0.0))),
            "bar_is": f"{BAR:.0%} of the copy's bandwidth, and Liger's, same run",
        }
        report.add(
            f"{case.figure}.{direction}_gbs.{size}",
            gbs["ours"],
            "GB/s",
            "higher",
            **(bar if size == BAR_SIZE else {}),
            peers={name: round(value, 1) for name, value in gbs.items() if name != "ours"},
            copy=round(roof),
            copy_of_as_many_bytes=round(copy_gbs(moved)),
            milliseconds=round(times["ours"].milliseconds, 4),
            spread=round(times["ours"].spread, 3),
            launch_microseconds=round(times["ours"].launch_microseconds),
            measured=MEASURED,
            relative_error=round(error, 5),
        )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """GB/s of everyone, a row a figure."""
    names = sorted({name for row in rows for name in row["peers"]})
    print(f"\n{'GB/s':40}{'ours':>10}{'of copy':>10}" + "".join(f"{name:>12}" for name in names))
    for row in rows:
        peers = "".join(f"{row['peers'].get(name, float('nan')):12.0f}" for name in names)
        print(f"{row['figure']:40}{row['value']:10.0f}{row['value'] / row['copy']:10.1%}{peers}")


def panels(rows: Sequence[dict[str, Any]]) -> Panels:
    """{op and direction: {who: [(tokens, GB/s)]}}."""
    found: Panels = {}
    for row in rows:
        name, size = row["figure"].rsplit("_gbs.", 1)
        for who, value in ({"ours": row["value"]} | row["peers"]).items():
            found.setdefault(name, {}).setdefault(who, []).append((SIZES[size], value))
    return found


def options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    arguments.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="tokens")
    return arguments.parse_args()


def main() -> None:
    arguments = options()
    report = Report("bandwidth", arguments)
    functorch_config.donated_buffer = False  # compiled peers: their backward is timed many times over one graph
    dynamo_config.recompile_limit = 64
    roof = copy_gbs()
    print(f"copy: {roof:.0f} GB/s")
    for op in arguments.ops:
        for size in arguments.sizes:
            for case in importlib.import_module(f"kernel_cases.{op}").cases(SIZES[size]):
                measure(case, size, roof, report)
    print_table(report.rows)
    plot_panels(arguments.results / "bandwidth.png", panels(report.rows), "GB/s", roof, "copy")
    print(report.write())


if __name__ == "__main__":
    main()
