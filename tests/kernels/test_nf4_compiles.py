"""The NF4 product compiles for a Hopper GPU, ahead of time and without one, as it is meant to.

What the interpreter cannot see: that the assembly assembles, that no register is spilled, and that the decoded weights
go to the tensor cores from the registers in which they were decoded (through shared memory, they would need more).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# How it is cut up; programs that the registers of a multiprocessor are to hold; bytes of shared memory: two buffers of
# codes and of x, and the scales'.
KERNELS = {
    "few_rows": ({"ROWS": 8, "OUTS": 128, "BLOCKS": 2, "WARPS": 4, "SHARING": 1}, 5, 22 * 2**10),
    "one_line_of_codes_a_step": ({"ROWS": 8, "OUTS": 64, "BLOCKS": 4, "WARPS": 4, "SHARING": 1}, 5, 26 * 2**10),
    "warps_that_share_rows": ({"ROWS": 32, "OUTS": 64, "BLOCKS": 4, "WARPS": 4, "SHARING": 2}, 3, 51 * 2**10),
    "many_rows": ({"ROWS": 64, "OUTS": 64, "BLOCKS": 2, "WARPS": 4, "SHARING": 2}, 3, 42 * 2**10),
}
# A process of its own: here Triton's functions may be the interpreter's.
COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from colora.kernels.nf4_linear_triton import nf4_linear_kernel as kernel

sizes = json.loads(sys.argv[1])
constants = sizes | {"WORD": 4, "SPLIT": True, "ADAPTED": True, "RANK": 16, "BLOCK_R": 16, "HAS_BIAS": True}
constants |= {"PLAIN": False, "AHEAD": True, "DOWN_ROWS": min(32, sizes["ROWS"])}
pointers = dict.fromkeys(["x", "bias", "u", "A", "B", "out"], "*bf16")
pointers |= dict.fromkeys(["group_scales", "offset", "tables", "partial", "pieces_of_u"], "*fp32")
pointers |= {"codes": "*u8", "scale_words": "*i32", "group_start": "*i32", "counters": "*i32", "signals": "*i32"}
aligned = [*pointers, "out_features", "x_stride", "row_bytes"]
names = kernel.arg_names
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
options = {"num_warps": sizes["WARPS"], "num_stages": 3, "enable_fp_fusion": False, "launch_pdl": True}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
with tempfile.TemporaryDirectory() as folder:
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
fields = [field.split(":") for field in usage.split() if ":" in field]
print(json.dumps({"shared": compiled.metadata.shared} | {name: int(n) for name, n in fields if n.isdecimal()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_or_detours(name: str, tmp_path: Path) -> None:
    sizes, programs, shared = KERNELS[name]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(sizes)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    usage = json.loads(result.stdout.splitlines()[-1])
    assert usage["STACK"] == usage["LOCAL"] == 0, "registers are spilled"
    assert usage["REG"] * 32 * sizes["WARPS"] * programs <= 2**16, "too few programs run at a time"
    assert usage["shared"] <= shared, "the decoded weights go through shared memory"
