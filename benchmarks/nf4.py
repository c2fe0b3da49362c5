"""NF4 kernels: the product of few rows against cuBLAS in bf16, and quantise and dequantise against a copy's bandwidth.

Matrices are rotated through more than the L2 cache; times are of CUDA graphs, the median of their replays. Results are
checked against the decoded weights before anything is timed. `--tune` measures the configs first and writes the fastest
in the form of kernels/nf4_configs.json.
"""

from collections.abc import Sequence

import torch
from colora.kernels import nf4
from colora.kernels.nf4_few_rows import MAX_ROWS
from colora.kernels.nf4_linear import nf4_linear
from colora.kernels.nf4_tuning import TUNING
from common import Report, parser
from four_bit import BARS, Case, Format, add_options, measure_all, timed
from torch import Tensor

ROWS = [*BARS, MAX_ROWS, 2 * MAX_ROWS]  # the last is decoded once and multiplied by cuBLAS


def stored(dense: Tensor, outs: Sequence[int]) -> nf4.NF4Tensor:
    """Each fused projection is quantised by itself, as it is loaded."""
    parts = [nf4.quantize(part) for part in dense.split(list(outs))]
    made = nf4.empty(outs, dense.shape[1], dense.device)
    for ours, theirs in zip(made.tensors(), zip(*(part.tensors() for part in parts), strict=True), strict=True):
        if ours is not made.group_start:
            ours.copy_(torch.cat(theirs))
    return made


def measure_quantise(case: Case, report: Report) -> None:
    """As GB/s of the bytes that have to be read and written."""
    quantised, dense = case.stored[0], case.dense[0]
    for ours, plain in zip(nf4.quantize_blocks(dense), nf4.quantize_blocks_reference(dense), strict=True):
        assert torch.equal(ours, plain)
    microseconds, spread = timed(nf4.quantize_blocks, case.dense)
    report.add(
        "nf4.quantise",
        (quantised.codes.nbytes + 4 * quantised.scale_codes.numel() + dense.nbytes) / microseconds / 1e3,
        "GB/s",
        "higher",
        microseconds=round(microseconds, 1),
        spread=round(spread, 3),
    )


def main() -> None:
    options = parser(__doc__)
    add_options(options, ROWS)
    arguments = options.parse_args()
    report = Report("nf4", arguments)
    measure_all(Format("nf4", nf4, nf4_linear, TUNING, MAX_ROWS, stored), arguments, report, measure_quantise)
    print(report.write())


if __name__ == "__main__":
    main()
