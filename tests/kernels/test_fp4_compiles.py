"""The FP4 product compiles for a Hopper GPU, ahead of time and without one, as it is meant to.

What the interpreter cannot see: that the assembly assembles, that no register is spilled, that weights go to the tensor
cores from the registers in which they were decoded (through shared memory, they would need more; only where warps
multiply in groups of four do they go there, once), that no step of the loop writes to registers from which the cores
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
    "few_rows": ({"ROWS": 8, "OUTS": 64, "CHUNKS": 4, "WARPS": 4, "SHARING": 1, "buffers": 3}, 5, 39 * 2**10, 2.6),
    "sharing": ({"ROWS": 8, "OUTS": 64, "CHUNKS": 4, "WARPS": 4, "SHARING": 2, "buffers": 3}, 5, 39 * 2**10, 2.6),
    "more_rows": ({"ROWS": 32, "OUTS": 64, "CHUNKS": 4, "WARPS": 4, "SHARING": 1, "buffers": 2}, 4, 51 * 2**10, 3.2),
    "together": ({"ROWS": 64, "OUTS": 64, "CHUNKS": 1, "WARPS": 4, "SHARING": 0, "buffers": 3}, 3, 47 * 2**10, 4.6),
    "most_rows": (
        {"ROWS": 128, "OUTS": 64, "CHUNKS": 1, "WARPS": 4, "SHARING": 0, "buffers": 2, "registers": 168},
        3,
        61 * 2**10,
        4.8,
    ),
}
POINTERS = {"codes": "*i32", "row_scales": "*fp32"}


def compiled(sizes: dict[str, int], cache: Path) -> dict[str, int]:
    """What the kernel uses, and the instructions of its loop over W."""
    constants = {name: size for name, size in sizes.items() if name not in ("buffers", "registers")}
    pointers = POINTERS | {"scale_words": {1: "*i16", 2: "*i32", 4: "*i64"}[sizes["CHUNKS"]]}
    options = {"num_stages": sizes["buffers"] + 1} | ({"maxnreg": sizes["registers"]} if "registers" in sizes else {})
    return resource_usage("fp4", constants, pointers, options, cache, products=8 if sizes["SHARING"] else 4)


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
    assert usage["REG"] * 32 * sizes["WARPS"] * programs <= 2**16, "too few programs run at a time"
    assert usage["shared"] <= shared, "the decoded weights go through shared memory, or twice"
    assert usage["pending"] == 0, "registers are written to while the tensor cores read from them"
    weights = sizes["OUTS"] * sizes["CHUNKS"] * 64 / (32 * sizes["WARPS"])
    assert 1 < usage["instructions"] / weights <= instructions
