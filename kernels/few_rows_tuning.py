"""How a product of few rows is cut up: measured once for a shape and a kind of GPU, then remembered on disk.

Looked up in this order: what `tune` found on this machine, in the user's cache; what is known of this kind of GPU, in a
file beside this one; a rule of thumb. Nothing is measured unless `tune` is called, as an engine that is about to
capture CUDA graphs does while it starts.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import triton
from torch import Tensor

from .few_rows_adapter import rows_of_program

Shape = tuple[int, int]  # out, in
C = TypeVar("C")  # a frozen dataclass of numbers
RESIDENT_WARPS, CYCLES_A_SPLIT = 16, 100  # of an H200's multiprocessor, for `ranked_splits`
ROTATED_BYTES = 150e6  # of copies of a matrix that are multiplied in turn, so that the L2 cache does not hold them


@dataclass(frozen=True)
class Speed:
    """Of one format's programs on a multiprocessor of an H200, for `ranked_splits`.

    Attributes:
        weights: read and decoded in a cycle, at most.
        weights_a_warp: the same for each warp.
        cycles_around: that a program takes before its first weight and after its last.
    """

    weights: float
    weights_a_warp: float
    cycles_around: float


def ranked_splits(tiles: int, steps: int, step_weights: int, warps: int, processors: int, speed: Speed) -> list[int]:
    """Every number of splits that differs, the fastest by a rough estimate first.

    The multiprocessor with the most programs is the last, so their number should be little below a multiple of
    `processors`. Each needs its time before the first weight and after the last; fewer warps are less busy.

    Args:
        tiles: of rows of W.
        steps: of columns, in a row.
        step_weights: that a program multiplies in a step.
        warps: of a program.
    """

    def cycles(splits: int) -> float:
        programs = triton.cdiv(tiles * splits, processors)
        rounds = triton.cdiv(programs * warps, RESIDENT_WARPS)
        weights = programs * triton.cdiv(steps, splits) * step_weights
        rate = min(speed.weights, speed.weights_a_warp * programs * warps)
        return float(rounds * speed.cycles_around + weights / rate + CYCLES_A_SPLIT * splits)

    different = {triton.cdiv(steps, triton.cdiv(steps, wanted)) for wanted in range(1, max(1, steps) + 1)}
    return sorted(different, key=lambda splits: (cycles(splits), splits))


@dataclass
class Tuning(Generic[C]):
    """The configs of one kernel.

    Attributes:
        name: of its files.
        config: the type of its configs.
        dtypes: of x that it multiplies.
        rows: the numbers of rows that have a config each.
        candidates: (shape, rows, multiprocessors of the GPU) -> what to measure, the rule of thumb first.
        random_matrix: a quantised matrix, and its bytes.
        launch: the product of x with such a matrix.
    """

    name: str
    config: type[C]
    dtypes: Sequence[torch.dtype]
    rows: Sequence[int]
    candidates: Callable[[Shape, int, int], list[C]]
    random_matrix: Callable[[Shape, torch.device], tuple[Any, int]]
    launch: Callable[[Tensor, Any, C], Tensor]
    _found: dict[tuple[torch.device, Shape, int], C] = field(default_factory=dict, init=False)

    @property
    def known(self) -> Path:
        """The table of known GPUs, {GPU: {OUTxIN: {rows: fields of a config}}}; it need not exist."""
        return Path(__file__).with_name(f"{self.name}_configs.json")

    @property
    def cache(self) -> Path:
        """A file in colora's folder of the user's cache (the XDG base directory specification)."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return base / "colora" / f"{self.name}_linear.json"

    def chosen(self, device: torch.device, shape: Shape, rows: int) -> C:
        """The config for a matrix of this shape and `rows` rows of x."""
        key = (device, shape, rows_of_program(rows))
        if key not in self._found:
            self._found[key] = self._look_up(*key)
        return self._found[key]

    def _look_up(self, device: torch.device, shape: Shape, rows: int) -> C:
        name = torch.cuda.get_device_name(device)
        for table in (self._read(self.cache).get(_machine(name)), self._read(self.known).get(name)):
            fields = (table or {}).get(_key(shape), {}).get(str(rows))
            if fields is not None:
                return self.config(**fields)
        return self.candidates(shape, rows, _processors(device))[0]

    def tune_unknown(self, shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> None:
        """`tune` for the shapes of which neither the cache nor the table of known GPUs has anything.

        Nothing is measured for a dtype that the kernel does not multiply.
        """
        if dtype not in self.dtypes:
            return
        known = self._read(self.known).get(torch.cuda.get_device_name(device), {})
        self.tune([shape for shape in shapes if _key(shape) not in known], dtype, device)

    def tune(
        self,
        shapes: Iterable[Shape],
        dtype: torch.dtype,
        device: torch.device,
        report: Callable[[Shape, int, dict[C, float]], None] = lambda shape, rows, times: None,
    ) -> dict[str, Any]:
        """Measure the candidates for each shape and number of rows, and write the fastest to the cache.

        Shapes that the cache has already are not measured again. Takes a second or two for each kernel that is not
        compiled yet, then about 10 ms a candidate.

        Args:
            report: told of every shape and number of rows measured, with the microseconds of each candidate.

        Returns:
            What the cache holds for this machine, {OUTxIN: {rows: fields of a config}}.
        """
        content = self._read(self.cache)
        table = content.setdefault(_machine(torch.cuda.get_device_name(device)), {})
        measured = False
        for shape in shapes:
            missing = [count for count in self.rows if str(count) not in table.get(_key(shape), {})]
            copies = self._copies(shape, device) if missing else []
            for count in missing:
                x = torch.randn(count, shape[1], device=device).to(dtype)
                configs = self.candidates(shape, count, _processors(device))
                times = {config: self.microseconds(x, copies, config) for config in configs}
                report(shape, count, times)
                best: Any = min(times, key=lambda config: times[config])
                table.setdefault(_key(shape), {})[str(count)] = asdict(best)
                measured = True
        if measured:
            _write(self.cache, content)
            self._found.clear()
        return dict(table)

    def microseconds(self, x: Tensor, copies: Sequence[Any], config: C, replays: int = 3) -> float:
        """Of one product and an elementwise kernel: mean over the copies in a CUDA graph, of the fastest replay.

        In an engine another kernel runs between two products, and what a product does ahead of its start goes on
        beside that one, not beside another product. inf where a program does not fit on this kind of GPU.
        """
        try:
            self.launch(x, copies[0], config)
        except triton.runtime.errors.OutOfResources:  # shared memory or registers: another kind of GPU
            return float("inf")
        graph, before = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            for copy in copies:
                x.copy_(before)
                self.launch(x, copy, config)
        times = []
        for _ in range(replays + 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / len(copies))
        return min(times[1:])

    def _copies(self, shape: Shape, device: torch.device) -> list[Any]:
        """Random matrices, together more than the L2 cache."""
        first, nbytes = self.random_matrix(shape, device)
        return [first, *(self.random_matrix(shape, device)[0] for _ in range(int(ROTATED_BYTES // nbytes)))]

    def _read(self, path: Path) -> dict[str, Any]:
        """Empty, with a warning, where the file cannot be understood."""
        try:
            content = json.loads(path.read_text())
            for table in content.values():
                for by_rows in table.values():
                    for fields in by_rows.values():
                        self.config(**fields)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{path} is not a table of {self.name} configs and is ignored ({error}); tuning writes it anew",
                stacklevel=2,
            )
            return {}
        return dict(content)


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _key(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _machine(name: str) -> str:
    return f"{name}, Triton {triton.__version__}"


def _write(path: Path, content: dict[str, Any]) -> None:
    """At once: a process that is killed, or reads meanwhile, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
