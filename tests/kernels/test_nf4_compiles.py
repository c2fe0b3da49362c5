"""The NF4 product compiles for a Hopper GPU, ahead of time and without one, as it is meant to.

What the interpreter cannot see: that the assembly assembles, that no register is spilled, that weights go to the tensor
cores from the registers in which they were decoded, that no step of the loop writes to registers from which the cores
still read.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from .compile_few_rows import resource_usage

# How it is cut up; programs that the registers of a multiprocessor are to hold; bytes of shared memory for Triton: the
# buffers of codes, of x and of scales.
KERNELS = {
    "few_rows": ({"ROWS": 8, "OUTS": 64, "BLOCKS": 4, "TOGETHER": False, "buffers": 2}, 5, 26 * 2**10),
    "few_rows_fewer_blocks": ({"ROWS": 8, "OUTS": 64, "BLOCKS": 2, "TOGETHER": False, "buffers": 3}, 8, 20 * 2**10),
    "few_rows_more_outs": (
        {"ROWS": 8, "OUTS": 128, "BLOCKS": 4, "TOGETHER": False, "buffers": 2, "registers": 128},
        4,
        42 * 2**10,
    ),
    "32_rows": ({"ROWS": 32, "OUTS": 64, "BLOCKS": 4, "TOGETHER": True, "buffers": 2}, 3, 66 * 2**10),
    "64_rows": ({"ROWS": 64, "OUTS": 64, "BLOCKS": 2, "TOGETHER": True, "buffers": 2, "registers": 168}, 3, 58 * 2**10),
    "most_rows": (
        {"ROWS": 128, "OUTS": 64, "BLOCKS": 1, "TOGETHER": True, "buffers": 2, "registers": 168},
        3,
        54 * 2**10,
    ),
}
POINTERS = dict.fromkeys(["group_scales", "offset", "tables"], "*fp32")
POINTERS |= dict.fromkeys(["codes", "scale_words", "group_start"], "*i32")


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_or_detours(name: str, tmp_path: Path) -> None:
    sizes, programs, shared = KERNELS[name]
    capped = {"maxnreg": sizes["registers"]} if "registers" in sizes else {}
    constants = {"WORD": 4, "WARPS": 4}
    constants |= {name: size for name, size in sizes.items() if name not in ("buffers", "registers")}
    options = {"num_stages": sizes["buffers"] + 1, "enable_fp_fusion": False} | capped
    usage = resource_usage("nf4", constants, POINTERS, options, tmp_path, products=4)
    few = 64 if capped else 0  # bytes, of what the loop does not need
    assert usage["STACK"] <= few and usage["LOCAL"] == usage["spills"] == 0, "registers are spilled"
    assert usage["REG"] * 128 * programs <= 2**16, "too few programs run at a time"
    assert usage["shared"] <= shared and usage["stores"] == 0, "decoded weights go through shared memory"
    assert usage["pending"] == 0, "registers are written to while the tensor cores read from them"
