"""Which `Config` the NF4 product of few rows uses: measured once for a shape and a GPU, then remembered on disk.

Looked up in this order: what `tune` found on this machine, in the user's cache; what is known of this kind of GPU,
in `nf4_configs.json` beside this file; a rule of thumb. Nothing is measured unless `tune` is called, as an engine that
is about to capture CUDA graphs does while it starts.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .nf4 import BLOCK, NF4Tensor, empty
from .nf4_few_rows import MAX_ROWS, Config, launch, rows_of_program

Shape = tuple[int, int]  # out, in
KNOWN = Path(__file__).with_name("nf4_configs.json")
ROWS = (8, 16, 32, 64, MAX_ROWS)  # what `rows_of_program` gives
_ROTATED_BYTES = 150e6  # of copies of a matrix that are multiplied in turn, so that the L2 cache does not hold them


def default_cache() -> Path:
    """`nf4_linear.json` in colora's folder of the user's cache (the XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colora" / "nf4_linear.json"


def chosen(device: torch.device, shape: Shape, rows: int) -> Config:
    """The config for a matrix of this shape and `rows` rows of x."""
    return _chosen(device, shape, rows_of_program(rows))


@cache
def _chosen(device: torch.device, shape: Shape, rows: int) -> Config:
    name = torch.cuda.get_device_name(device)
    for table in (_read(default_cache()).get(_machine(name)), _read(KNOWN).get(name)):
        found = (table or {}).get(_key(shape), {}).get(str(rows))
        if found is not None:
            return Config(**found)
    return rule_of_thumb(shape, rows, torch.cuda.get_device_properties(device).multi_processor_count)


def rule_of_thumb(shape: Shape, rows: int, processors: int) -> Config:
    """About three programs for each of the GPU's `processors`."""
    wgmma = rows >= 32
    blocks = 1 if rows >= 128 else 2  # what fits into the 99 KiB of shared memory of consumer GPUs
    splits = _splits(shape, 128, blocks, 3 * processors)
    return Config(outs=128, warps=8 if wgmma else 4, blocks=blocks, buffers=2, splits=splits, wgmma=wgmma)


def candidates(shape: Shape, rows: int, processors: int) -> list[Config]:
    """What `tune` measures."""
    kinds = [(128, 4, 2, 2, False), (64, 4, 4, 2, False)]  # outs, warps, blocks, buffers, wgmma
    if rows == 8:
        kinds += [(256, 4, 2, 2, False), (128, 4, 4, 2, False)]
    if rows in (32, 64):
        kinds = [(128, 4, 2, 2, False), (128, 4, 2, 2, True), (128, 8, 2, 2, True)]
    if rows >= 128:
        kinds = [(128, 8, 2, 2, True), (128, 8, 1, 3, True)]
    return [
        Config(outs, warps, blocks, buffers, splits, wgmma)
        for outs, warps, blocks, buffers, wgmma in kinds
        for splits in sorted({_splits(shape, outs, blocks, share * processors) for share in (1, 2, 3, 4, 6)})
    ]


def _splits(shape: Shape, outs: int, blocks: int, programs: int) -> int:
    """Splits for about as many programs: none without a step, none shorter than four blocks if there are more."""
    steps = max(1, shape[1] // BLOCK // blocks)
    wanted = max(1, min(steps * blocks // 4, round(programs / triton.cdiv(shape[0], outs))))
    return int(triton.cdiv(steps, triton.cdiv(steps, wanted)))


def tune(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    device: torch.device,
    rows: Sequence[int] = ROWS,
    file: Path | None = None,
    report: Callable[[Shape, int, dict[Config, float]], None] = lambda shape, rows, times: None,
) -> dict[Shape, dict[int, Config]]:
    """Measure the candidates for each shape and number of rows, and write the fastest to the cache.

    Shapes that the cache has already are not measured again. Takes a second or two for each kernel that is not
    compiled yet, then about 10 ms a candidate.

    Args:
        file: default_cache() if not given.
        report: told of every shape and number of rows measured, with the microseconds of each candidate.

    Returns:
        What was measured.
    """
    file = file or default_cache()
    name = torch.cuda.get_device_name(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    content = _read(file)
    table = content.setdefault(_machine(name), {})
    found: dict[Shape, dict[int, Config]] = {}
    for shape in shapes:
        missing = [count for count in rows if str(count) not in table.get(_key(shape), {})]
        copies = _random_copies(shape, device) if missing else []
        for count in missing:
            x = torch.randn(count, shape[1], device=device).to(dtype)
            times = {config: _microseconds(x, copies, config) for config in candidates(shape, count, processors)}
            report(shape, count, times)
            best = min(times, key=lambda config: times[config])
            found.setdefault(shape, {})[count] = best
            table.setdefault(_key(shape), {})[str(count)] = asdict(best)
    if found:
        _write(file, content)
        _chosen.cache_clear()
    return found


def tune_unknown(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> dict[Shape, dict[int, Config]]:
    """`tune` for the shapes of which neither the cache nor the table of known GPUs has anything."""
    known = _read(KNOWN).get(torch.cuda.get_device_name(device), {})
    return tune([shape for shape in shapes if _key(shape) not in known], dtype, device)


def measured(device: torch.device) -> dict[str, Any]:
    """What this machine's cache holds for the device, in the form of `KNOWN`: {OUTxIN: {rows: fields of a Config}}."""
    return dict(_read(default_cache()).get(_machine(torch.cuda.get_device_name(device)), {}))


def _microseconds(x: Tensor, copies: Sequence[NF4Tensor], config: Config, replays: int = 3) -> float:
    """Of one product, the mean over the copies in a CUDA graph, of the fastest replay; inf where it does not fit."""
    try:
        launch(x, copies[0], None, None, config)
    except triton.runtime.errors.OutOfResources:  # shared memory or registers: another kind of GPU
        return float("inf")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            launch(x, copy, None, None, config)
    times = []
    for _ in range(replays + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(copies))
    return min(times[1:])


def _random_copies(shape: Shape, device: torch.device) -> list[NF4Tensor]:
    """Matrices of random codes, together more than the L2 cache."""

    def random() -> NF4Tensor:
        nf4 = empty([shape[0]], shape[1], device)
        nf4.codes.random_(0, 256)
        nf4.scale_codes.random_(0, 256)
        nf4.group_scales.fill_(0.01)
        nf4.offset.fill_(0.05)
        return nf4

    first = random()
    return [first, *(random() for _ in range(int(_ROTATED_BYTES // first.nbytes)))]


def _key(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _machine(name: str) -> str:
    return f"{name}, Triton {triton.__version__}"


def _read(path: Path) -> dict[str, Any]:
    """{GPU: {OUTxIN: {rows: fields of a Config}}}; empty, with a warning, where the file cannot be understood."""
    try:
        content = json.loads(path.read_text())
        for table in content.values():
            for by_rows in table.values():
                for fields in by_rows.values():
                    Config(**fields)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a table of NF4 configs and is ignored ({error}); tuning writes it anew", stacklevel=2
        )
        return {}
    return dict(content)


def _write(path: Path, content: dict[str, Any]) -> None:
    """At once: a process that is killed, or reads meanwhile, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
