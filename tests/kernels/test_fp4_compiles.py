"""The FP4 product compiles for a Hopper GPU, ahead of time and without one, as it is meant to.

What the interpreter cannot see: that the assembly assembles, that no register is spilled, that weights go to the tensor
cores from the registers in which they were decoded, that no step of the loop writes to registers from which the cores
still read, and that the loop takes few instructions a weight, which is what the format is for.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from colora.kernels.few_rows_adapter import MAX_RANK

from .compile_few_rows import resource_usage

# How it is cut up; programs that a multiprocessor is to hold; bytes of shared memory; instructions of the loop a weight
# and lane.
KERNELS = {
    "few_rows": ({"ROWS": 8, "OUTS": 64, "CHUNKS": 4, "TOGETHER": False, "buffers": 2}, 7, 25 * 2**10, 2.7),
    "16_rows": ({"ROWS": 16, "OUTS": 64, "CHUNKS": 4, "TOGETHER": True, "buffers": 2}, 4, 41 * 2**10, 2.9),
    "32_rows": ({"ROWS": 32, "OUTS": 64, "CHUNKS": 4, "TOGETHER": True, "buffers": 2}, 3, 65 * 2**10, 2.9),
    "64_rows": ({"ROWS": 64, "OUTS": 64, "CHUNKS": 2, "TOGETHER": True, "buffers": 2}, 3, 57 * 2**10, 3.5),
    "most_rows": (
        {"ROWS": 128, "OUTS": 64, "CHUNKS": 1, "TOGETHER": True, "buffers": 2, "registers": 168},
        3,
        53 * 2**10,
        4.8,
    ),
}
POINTERS = {"codes": "*i32", "row_scales": "*fp32"}


def compiled(sizes: dict[str, int], cache: Path) -> dict[str, int]:
    """What the kernel uses, and the instructions of its loop over W."""
    constants = {name: size for name, size in sizes.items() if name not in ("buffers", "registers")}
    word = max(2, sizes["CHUNKS"])
    pointers = POINTERS | {"scale_words": {2: "*i32", 4: "*i64"}[word]}
    options = {"num_stages": sizes["buffers"] + 1} | ({"maxnreg": sizes["registers"]} if "registers" in sizes else {})
    return resource_usage("fp4", constants | {"WORD": word, "WARPS": 4}, pointers, options, cache, products=4)


@pytest.mark.slow
def test_the_largest_rank_fits(tmp_path: Path) -> None:
    """Beside most rows: B's tile and u's in the shared memory of a multiprocessor, of which a program has 227 KiB."""
    rank = {"RANK": MAX_RANK, "BLOCK_R": MAX_RANK}
    assert compiled(KERNELS["most_rows"][0] | rank, tmp_path)["shared"] <= 227 * 2**10


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_or_detours(name: str, tmp_path: Path) -> None:
    sizes, programs, shared, instructions = KERNELS[name]
    usage = compiled(sizes, tmp_path)
    few = 64 if "registers" in sizes else 0  # bytes, of what the loop does not need
    assert usage["STACK"] <= few and usage["LOCAL"] == usage["spills"] == 0, "registers are spilled"
    assert usage["REG"] * 128 * programs <= 2**16, "too few programs run at a time"
    assert usage["shared"] <= shared and usage["stores"] == 0, "decoded weights go through shared memory"
    assert usage["pending"] == 0, "registers are written to while the tensor cores read from them"
    assert 1 < usage["instructions"] / (sizes["OUTS"] * sizes["CHUNKS"] * 64 / 128) <= instructions
