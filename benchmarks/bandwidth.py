"""The elementwise Triton kernels: GB/s forward and backward beside plain torch, compiled torch and Liger.

Times are medians with a cold L2 cache. The roof is the bandwidth of a device-to-device copy, measured in the same run.
Beside the JSON goes bandwidth.png: GB/s against the number of tokens.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Report, parser
from kernel_cases import Case, Implementation
from plots import Panels, plot_panels
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from triton.testing import do_bench

FOLDER = Path(__file__).parent / "kernel_cases"
OPS = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
SIZES = {"1k": 1024, "4k": 4096, "16k": 16384, "64k": 65536}
BAR, BAR_SIZE = 0.85, "16k"
COPIED = 2**30  # bytes of the roof's copy, read once and written once


def milliseconds(run: Callable[[], Any]) -> tuple[float, float]:
    """(median, spread: the middle three fifths over the median)."""
    median, low, high = do_bench(run, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8])
    return median, (high - low) / median


def copy_gbs(moved: int = 2 * COPIED) -> float:
    """GB/s of a copy that reads and writes `moved` bytes altogether."""
    source = torch.empty(moved // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))[0] / 1e6


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


def forward_time(implementation: Implementation, case: Case) -> tuple[float, float]:
    # An op in place goes over its own output again and again: other values, the same work.
    inputs = implementation.prepare(*case.inputs)
    with torch.no_grad():
        return milliseconds(lambda: implementation.run(*inputs))


def backward_time(implementation: Implementation, case: Case) -> tuple[float, float]:
    inputs = implementation.prepare(*case.inputs)
    outputs = run_with_graph(case, implementation, inputs)
    grads = [torch.randn_like(output) for output in outputs]
    return milliseconds(lambda: torch.autograd.grad(outputs, leaves(inputs), grads, retain_graph=True))


def measure(case: Case, size: str, roof: float, report: Report) -> None:
    error = check(case)
    implementations = dict(case.implementations)
    reference = implementations["reference"]
    implementations["compiled"] = Implementation(torch.compile(reference.run), reference.prepare)
    passes = {"fwd": (forward_time, case.forward_bytes), "bwd": (backward_time, case.backward_bytes)}
    for direction, (time, moved) in passes.items():
        times = {name: time(implementation, case) for name, implementation in implementations.items()}
        gbs = {name: moved / median / 1e6 for name, (median, _) in times.items()}
        bar = {"bar": round(BAR * roof), "bar_is": f"{BAR:.0%} of the copy's bandwidth, same run"}
        report.add(
            f"{case.figure}.{direction}_gbs.{size}",
            gbs["ours"],
            "GB/s",
            "higher",
            **(bar if size == BAR_SIZE else {}),
            peers={name: round(value, 1) for name, value in gbs.items() if name != "ours"},
            copy=round(roof),
            copy_of_as_many_bytes=round(copy_gbs(moved)),
            milliseconds=round(times["ours"][0], 4),
            spread=round(times["ours"][1], 3),
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
