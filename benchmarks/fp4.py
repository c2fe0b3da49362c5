"""FP4 (kernels/fp4.py): its quantisation error against NF4's, and its kernels against cuBLAS in bf16.

The errors are relative, root mean square over 4096 x 4096 weights, and run on a CPU too: Gaussian weights; weights of
Student's t distribution with 5 degrees of freedom (heavy tails); weights whose inputs have scales of their own (log-
normal, sigma 0.5); and Gaussian ones of which one input in a hundred is ten times as large (outlier channels).

On a GPU, the product of few rows and dequantising: matrices are rotated through more than the L2 cache, times are of
CUDA graphs, the median of their replays, and results are checked against the decoded weights before anything is timed.
`--tune` measures the configs first and writes the fastest in the form of kernels/fp4_configs.json.
"""

import torch
from colora.kernels import fp4, nf4
from colora.kernels.fp4_few_rows import MAX_ROWS
from colora.kernels.fp4_linear import fp4_linear
from colora.kernels.fp4_tuning import TUNING
from common import Report, parser
from four_bit import BARS, Case, Format, add_options, measure_all, relative
from torch import Tensor

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
        fp4_error = relative(fp4.dequantize(fp4.quantize(weight), torch.float32), weight)
        nf4_error = relative(nf4.dequantize(nf4.quantize(weight), torch.float32), weight)
        report.add(f"nf4.quantisation_error.{name}", nf4_error, "relative RMS", "lower")
        report.add(
            f"fp4.quantisation_error.{name}", fp4_error, "relative RMS", "lower", peers={"nf4": round(nf4_error, 5)}
        )


def measure_quantise(case: Case, report: Report) -> None:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fp4.quantize(case.dense[0])
    stop.record()
    stop.synchronize()
    report.add("fp4.quantise", case.dense[0].numel() / start.elapsed_time(stop) / 1e6, "1e9 weights/s", "higher")


def main() -> None:
    options = parser(__doc__)
    add_options(options, [*BARS, MAX_ROWS])
    options.add_argument(
        "--errors", action="store_true", help="the quantisation errors alone, as on a CPU: fp4_errors.json"
    )
    arguments = options.parse_args()
    # Figures of a card are not written over by the errors alone.
    alone = arguments.errors or not torch.cuda.is_available()
    report = Report("fp4_errors" if alone else "fp4", arguments, script="fp4", on_cpu=True)
    measure_errors(report)
    if not alone:
        form = Format("fp4", fp4, fp4_linear, TUNING, MAX_ROWS, lambda dense, outs: fp4.quantize(dense))
        measure_all(form, arguments, report, measure_quantise)
    print(report.write())


if __name__ == "__main__":
    main()
