"""The FP4 product compiles for a Hopper GPU, ahead of time and without one, as it is meant to.

What the interpreter cannot see: that the assembly assembles, that no register is spilled, that weights go to the tensor
cores from the registers in which they were decoded (through shared memory, they would need more; only where all warps
multiply one tile do they go there, once), and that the loop takes few instructions a weight, which is what the format
is for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from colora.kernels.few_rows_adapter import MAX_RANK

# How it is cut up; programs that a multiprocessor is to hold; bytes of shared memory; instructions of the loop a weight
# and lane.
KERNELS = {
    "few_rows": ({"ROWS": 8, "OUTS": 64, "CHUNKS": 4, "WARPS": 4, "SHARING": 1, "buffers": 3}, 5, 39 * 2**10, 2.6),
    "sharing": ({"ROWS": 8, "OUTS": 64, "CHUNKS": 4, "WARPS": 4, "SHARING": 2, "buffers": 3}, 5, 39 * 2**10, 2.6),
    "more_rows": ({"ROWS": 32, "OUTS": 64, "CHUNKS": 4, "WARPS": 4, "SHARING": 1, "buffers": 2}, 4, 51 * 2**10, 3.2),
    "together": ({"ROWS": 64, "OUTS": 64, "CHUNKS": 1, "WARPS": 4, "SHARING": 0, "buffers": 3}, 3, 46 * 2**10, 4.4),
    "most_rows": ({"ROWS": 128, "OUTS": 128, "CHUNKS": 1, "WARPS": 8, "SHARING": 0, "buffers": 3}, 2, 92 * 2**10, 4.8),
}
# A process of its own: here Triton's functions may be the interpreter's.
COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from colora.kernels.fp4_linear_triton import fp4_linear_kernel as kernel

sizes = json.loads(sys.argv[1])
buffers, products = sizes.pop("buffers"), 8 if sizes["SHARING"] else 4
constants = {"RANK": 16, "BLOCK_R": 16} | sizes | {"SPLIT": True, "ADAPTED": True, "HAS_BIAS": True}
constants |= {"PLAIN": False, "AHEAD": True, "DOWN_ROWS": min(64, sizes["ROWS"])}
pointers = dict.fromkeys(["x", "bias", "A", "B", "u", "out"], "*bf16")
pointers |= dict.fromkeys(["row_scales", "partial", "pieces_of_u"], "*fp32")
pointers |= dict.fromkeys(["codes", "counters", "signals"], "*i32")
pointers["scale_words"] = {1: "*i16", 2: "*i32", 4: "*i64"}[sizes["CHUNKS"]]
aligned = [*pointers, "out_features", "x_stride", "row_words"]
names = kernel.arg_names
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
options = {"num_warps": sizes["WARPS"], "num_stages": buffers + 1, "launch_pdl": True}
options |= {"maxnreg": 128} if sizes["WARPS"] == 8 else {}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
tools = Path(triton.__file__).parent / "backends/nvidia/bin"

def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

with tempfile.TemporaryDirectory() as folder:
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    usage = tool(tools / "cuobjdump", "--dump-resource-usage", cubin)
    code = tool(tools / "nvdisasm", "-c", cubin).splitlines()
fields = [field.split(":") for field in usage.split() if ":" in field]
# The loop: of the backward branches around enough matrix products for W the one that takes least.
at = {line.split(":")[0].strip(): i for i, line in enumerate(code) if line.startswith(".L_")}
loops = [code[at[label]:i] for i, line in enumerate(code) if " BRA " in line for label in at
         if f"({label})" in line and at[label] < i]
loop = min((lines for lines in loops if sum("MMA." in line for line in lines) >= products), key=len)
instructions = sum(";" in line for line in loop)
found = {"shared": compiled.metadata.shared, "instructions": instructions}
print(json.dumps(found | {name: int(n) for name, n in fields if n.isdecimal()}))
"""


def compiled(sizes: dict[str, int], cache: Path) -> dict[str, int]:
    """What the kernel uses."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(sizes)],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


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
    few = 8 if sizes["WARPS"] == 8 else 0  # bytes, of what is needed once
    assert usage["STACK"] <= few and usage["LOCAL"] == 0, "registers are spilled"
    assert usage["REG"] * 32 * sizes["WARPS"] * programs <= 2**16, "too few programs run at a time"
    assert usage["shared"] <= shared, "the decoded weights go through shared memory, or twice"
    weights = sizes["OUTS"] * sizes["CHUNKS"] * 64 / (32 * sizes["WARPS"])
    assert 1 < usage["instructions"] / weights <= instructions
