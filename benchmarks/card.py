"""A smaller card imitated on a larger one: a ballast process holds all of its memory but N GiB while a command runs.

`python benchmarks/card.py 24 -- python benchmarks/train_throughput.py`. Running out of memory then happens at N GiB,
for everything on the card: CUDA contexts, PyTorch, vLLM. Every figure's JSON says in `free_gib_before` what was free.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

GIB = 2**30
STEP = 2**26  # bytes: how far what is free may be from what was asked for


def hold(free_gib: float) -> None:
    """Take memory until `free_gib` are left, say so, and keep it until standard input ends."""
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here: there is nothing to hold")
    target, held = int(free_gib * GIB), []
    free = torch.cuda.mem_get_info()[0]
    if free < target:
        raise SystemExit(f"only {free / GIB:.1f} GiB are free: cannot leave {free_gib:g} GiB")
    while free - target >= STEP:
        held.append(torch.empty((free - target) // STEP * STEP, dtype=torch.uint8, device="cuda"))
        free = torch.cuda.mem_get_info()[0]
    print(f"{free / GIB:.3f}", flush=True)
    sys.stdin.read()


@contextmanager
def ballast(free_gib: float) -> Iterator[float]:
    """Within it `free_gib` GiB of the card are free, to 64 MiB; yields what the driver says.

    Raises RuntimeError where less is free to begin with.
    """
    command = [sys.executable, __file__, "--hold", str(free_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the ballast did not start (exit code {process.wait()}); its message is above")
        try:
            yield float(line)
        finally:
            process.stdin.close()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("free_gib", type=float, help="GiB that stay free")
    options.add_argument("command", nargs="*", help="what to run meanwhile, after --")
    parsed = options.parse_args(arguments)
    if parsed.hold:
        hold(parsed.free_gib)
        return 0
    if not parsed.command:
        options.error("give a command after --")
    with ballast(parsed.free_gib) as free:
        print(f"{free:.2f} GiB of the card are free", flush=True)
        return subprocess.run(parsed.command).returncode


if __name__ == "__main__":
    sys.exit(main())
