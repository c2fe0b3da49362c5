"""Decode attention compiles for GPUs of three kinds, ahead of time and without one, and fits into their memory.

What the interpreter cannot see: types of variables that two branches set, and shared memory, of which smaller GPUs
(compute capability 8.6 and 8.9) have 99 KB for a program. Keys and values have to be copied beside the computation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SIZES = {"CAPACITY": 256, "ITEMS": 600, "HEADS": 4, "BLOCK_SIZE": 16, "ROWS": 64, "SEQUENCES": 256}
SIZES |= {"LEAST": 16, "LEAST_TILES": 4, "TOGETHER": 16}
SMALL_GPU = 99 * 2**10


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    result = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name, shared, asynchronous in json.loads(result.stdout.splitlines()[-1]):
        if name.startswith("attend_items"):
            assert asynchronous, "keys and values are waited for"
            assert shared <= (SMALL_GPU if capability == 86 else 113 * 2**10), name  # two programs at once on Hopper


def compiled(name: str, capability: int, constants: dict[str, Any], **options: int) -> tuple[int, bool]:
    """Bytes of shared memory, and whether global memory is copied there beside the computation."""
    import triton
    from colora.kernels import decode_attention_triton as kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    pointers = dict.fromkeys(["q", "cache", "out"], "*bf16") | dict.fromkeys(["partial", "log_sums"], "*fp32")
    types = pointers | {"scale": "fp32"} | dict.fromkeys(["count", "target"], "i32")
    signature, attributes, values = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = types.get(name, "i32" if name.endswith("_stride") else "*i32")
        if parameter.is_constexpr:
            signature[name], values[(i,)] = "constexpr", (SIZES | constants)[name]
        elif not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )
    return made.metadata.shared, "cp.async" in made.asm["ptx"]


def main(capability: int) -> None:
    from colora.kernels.decode_attention import tiles

    found = []
    for name in ("find_common", "find_leaders", "find_groups", "plan_items"):
        at_once = 1024 if name == "find_common" else 32
        found.append((name, *compiled(name, capability, {"AT_ONCE": at_once, "TILE": 64})))
    for head_dim in (64, 128, 256):
        tile, stages = tiles(head_dim)
        sizes = {"HEAD_DIM": head_dim, "TILE": tile, "AT_ONCE": 32}
        name = f"attend_items of {head_dim}"
        found.append((name, *compiled("attend_items", capability, sizes, num_warps=4, num_stages=stages)))
        found.append((f"merge of {head_dim}", *compiled("merge", capability, sizes)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
