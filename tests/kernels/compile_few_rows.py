"""Compiles a kernel of few rows for a Hopper GPU, ahead of time and without one, and tells what it uses.

In a process of its own, for which this file is the program: in the tests' Triton's functions may be the interpreter's.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Of the kernels of every format: all that they can do, for a rank of 16.
CONSTANTS = {"SPLIT": True, "ADAPTED": True, "HAS_BIAS": True, "RANK": 16, "BLOCK_R": 16, "PLAIN": False, "AHEAD": True}
POINTERS = dict.fromkeys(["x", "bias", "A", "B", "u", "out"], "*bf16")
POINTERS |= dict.fromkeys(["partial", "pieces_of_u"], "*fp32") | dict.fromkeys(["counters", "signals"], "*i32")


def resource_usage(
    name: str, sizes: dict[str, int], pointers: dict[str, str], options: dict[str, Any], cache: Path, products: int = 1
) -> dict[str, int]:
    """What the kernel of a format uses, launched with shapes and addresses that are multiples of 16.

    Args:
        name: "fp4" or "nf4".
        sizes: its constants, where they differ from CONSTANTS.
        pointers: types of its arguments that are no other format's.
        options: of Triton's compiler.
        cache: a folder for Triton's cache.
        products: of matrices, at least, in the loop whose instructions are counted.

    Returns:
        `cuobjdump`'s resource usage (REG, STACK, LOCAL, ...), "shared", bytes that Triton asks for, "instructions" of
        the loop, how many of these are "spills", how many "stores" of registers to shared memory, and "pending": how
        many products the tensor cores may still be busy with, at most, where the program waits for them.
    """
    sizes = CONSTANTS | {"DOWN_ROWS": min(64, sizes["ROWS"])} | sizes
    options = {"num_warps": sizes["WARPS"], "launch_pdl": True} | options
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, json.dumps([name, sizes, POINTERS | pointers, options, products])],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _usage(
    name: str, constants: dict[str, Any], pointers: dict[str, str], options: dict[str, Any], products: int
) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"colora.kernels.{name}_linear_triton"), f"{name}_linear_kernel")
    signature, attributes, values = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        signature[parameter.name] = pointers.get(parameter.name, "i32")
        if parameter.is_constexpr:
            signature[parameter.name], values[(i,)] = "constexpr", constants[parameter.name]
        elif not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _output(tools / "nvdisasm", "-c", cubin).splitlines()
    fields = [field.split(":") for field in usage.split() if ":" in field]
    waits = [
        int(line.split("pendings = ")[1].split()[0]) for line in made.asm["ttgir"].splitlines() if "pendings" in line
    ]
    loop = _loop(code, products)
    found = {
        "pending": max(waits, default=0),
        "shared": made.metadata.shared,
        "instructions": len(loop),
        "spills": sum("LDL" in line or "STL" in line for line in loop),
        "stores": sum(" STS" in line for line in loop),
    }
    return found | {field: int(number) for field, number in fields if number.isdecimal()}


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loop(code: list[str], products: int) -> list[str]:
    """The instructions of a loop: of the backward branches around enough matrix products the one that takes least."""
    at = {line.split(":")[0].strip(): i for i, line in enumerate(code) if line.startswith(".L_")}
    branches = [(i, line) for i, line in enumerate(code) if " BRA " in line]
    loops = [code[at[label] : i] for i, line in branches for label in at if f"({label})" in line and at[label] < i]
    enough = [lines for lines in loops if sum("MMA." in line for line in lines) >= products]
    return [line for line in min(enough, key=len) if ";" in line]


if __name__ == "__main__":
    print(json.dumps(_usage(*json.loads(sys.argv[1]))))
