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
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .nf4 import BLOCK, NF4Tensor, empty
from .nf4_few_rows import MAX_ROWS, Config, launch, rows_of_program, step_blocks

Shape = tuple[int, int]  # out, in
KNOWN = Path(__file__).with_name("nf4_configs.json")
ROWS = (8, 16, 32, MAX_ROWS)  # what `rows_of_program` gives
# Outs, warps, warps sharing rows of W, blocks, buffers and registers of the programs worth measuring, by rows; each is
# compiled where it is.
_KINDS: dict[int, list[tuple[int, int, int, int, int, int | None]]] = {
    8: [(64, 4, 2, 4, 2, None), (64, 4, 1, 4, 2, None), (128, 4, 1, 2, 2, None), (128, 4, 1, 4, 2, 128)],
    16: [(128, 4, 1, 2, 2, None), (64, 4, 2, 4, 2, None), (64, 4, 1, 4, 2, None)],
    32: [(128, 4, 1, 2, 2, None), (64, 4, 1, 4, 2, None), (128, 4, 1, 2, 2, 128)],
    64: [(64, 4, 1, 4, 2, None), (128, 4, 1, 2, 2, None), (128, 4, 1, 2, 2, 168)],
}
_SPLITS = 4  # numbers of splits to measure for each
# Of a multiprocessor of an H200, for the estimate: warps that run at a time, weights decoded, and what a program and
# one more range of columns cost.
_RESIDENT_WARPS, _WEIGHTS_A_CYCLE, _WEIGHTS_A_CYCLE_AND_WARP = 16, 20.0, 2.0
_CYCLES_AROUND, _CYCLES_A_SPLIT = 5000, 100
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
    """The splits with the best estimate, on a GPU of so many multiprocessors."""
    return _estimated(shape, Config(*_KINDS[rows][0], 1), processors)[0]


def candidates(shape: Shape, rows: int, processors: int) -> list[Config]:
    """What `tune` measures: of each kind of program the splits with the best estimates."""
    kinds = [Config(*kind, 1) for kind in _KINDS[rows]]
    return [config for kind in kinds for config in _estimated(shape, kind, processors)[:_SPLITS]]


def _estimated(shape: Shape, kind: Config, processors: int) -> list[Config]:
    """The kind with every number of splits that differs, the fastest by a rough estimate first.

    The multiprocessor with the most programs is the last, so their number should be little below a multiple of
    `processors`. Each needs its time before the first weight and after the last; fewer warps are less busy.
    """
    blocks = step_blocks(shape[1], kind.blocks)
    steps, tiles = max(1, shape[1] // BLOCK // blocks), triton.cdiv(shape[0], kind.outs)

    def cycles(splits: int) -> float:
        programs = triton.cdiv(tiles * splits, processors)
        rounds = triton.cdiv(programs * kind.warps, _RESIDENT_WARPS)
        weights = programs * triton.cdiv(steps, splits) * blocks * BLOCK * kind.outs
        rate = min(_WEIGHTS_A_CYCLE, _WEIGHTS_A_CYCLE_AND_WARP * programs * kind.warps)
        return float(rounds * _CYCLES_AROUND + weights / rate + _CYCLES_A_SPLIT * splits)

    different = {triton.cdiv(steps, triton.cdiv(steps, wanted)) for wanted in range(1, steps + 1)}
    return [replace(kind, splits=splits) for splits in sorted(different, key=lambda splits: (cycles(splits), splits))]


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
