"""The NF4 product compiles for a Hopper GPU, ahead of time and without one, as it is meant to.

What the interpreter cannot see: that the assembly assembles, that no register is spilled, that weights go to the tensor
cores from the registers in which they were decoded (through shared memory, they would need more; only where warps
multiply in groups of four do they go there, once), that no step of the loop writes to registers from which the cores
still read.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from .compile_few_rows import resource_usage

# How it is cut up; programs that the registers of a multiprocessor are to hold; bytes of shared memory: two buffers of
# codes and of x, and the scales'.
KERNELS = {
    "few_rows": ({"ROWS": 8, "OUTS": 128, "BLOCKS": 2, "WARPS": 4, "SHARING": 1}, 5, 22 * 2**10),
    "one_line_of_codes_a_step": ({"ROWS": 8, "OUTS": 64, "BLOCKS": 4, "WARPS": 4, "SHARING": 1}, 5, 26 * 2**10),
    "warps_that_share_rows": ({"ROWS": 32, "OUTS": 64, "BLOCKS": 4, "WARPS": 4, "SHARING": 2}, 3, 51 * 2**10),
    "together": ({"ROWS": 64, "OUTS": 64, "BLOCKS": 1, "WARPS": 4, "SHARING": 0}, 3, 28 * 2**10),
    "most_rows": ({"ROWS": 128, "OUTS": 64, "BLOCKS": 1, "WARPS": 4, "SHARING": 0, "registers": 168}, 3, 52 * 2**10),
    "most_programs": (
        {"ROWS": 128, "OUTS": 64, "BLOCKS": 1, "WARPS": 4, "SHARING": 0, "registers": 128},
        4,
        52 * 2**10,
    ),
}
POINTERS = dict.fromkeys(["group_scales", "offset", "tables"], "*fp32")
POINTERS |= {"scale_words": "*i32", "group_start": "*i32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_or_detours(name: str, tmp_path: Path) -> None:
    sizes, programs, shared = KERNELS[name]
    capped = {"maxnreg": sizes["registers"]} if "registers" in sizes else {}
    constants = {"WORD": 4} | {name: size for name, size in sizes.items() if name != "registers"}
    codes = {"codes": "*u8" if sizes["SHARING"] else "*i32"}
    options = {"num_stages": 3, "enable_fp_fusion": False} | capped
    usage = resource_usage("nf4", constants, POINTERS | codes, options, tmp_path)
    few = 64 if capped else 0  # bytes, of what the loop does not need
    assert usage["STACK"] <= few and usage["LOCAL"] == usage["spills"] == 0, "registers are spilled"
    assert usage["REG"] * 32 * sizes["WARPS"] * programs <= 2**16, "too few programs run at a time"
    assert usage["shared"] <= shared, "the decoded weights go through shared memory"
    assert usage["pending"] == 0, "registers are written to while the tensor cores read from them"
