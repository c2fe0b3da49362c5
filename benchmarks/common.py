"""What every benchmark shares: its options, the JSON of its figures, and the card's memory as the driver sees it."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON goes")
    options.add_argument("--commit", default=None, help="what is measured, where the tree is not a git checkout")
    return options


def used_gib() -> float:
    """Memory of the card in use by anyone, as the driver (NVML) reports it."""
    return torch.cuda.device_memory_used() / GIB


@contextmanager
def peak_memory(poll_seconds: float = 0.02) -> Iterator[list[float]]:
    """Within it the card's memory is polled; the list's only element is the peak in GiB so far."""
    peak, stop = [used_gib()], threading.Event()

    def poll() -> None:
        while not stop.wait(poll_seconds):
            peak[0] = max(peak[0], used_gib())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


@dataclass
class Report:
    """The rows of one script's figures, written as benchmarks/results/NAME.json, each when it is known.

    Make it before anything is allocated on the card: it notes what was free. `script` is the script's name where its
    figures are in several files, `on_cpu` says that no card is needed for them; for all others SystemExit is raised
    where there is none.
    """

    name: str
    options: argparse.Namespace
    script: str | None = None
    on_cpu: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (self.on_cpu or torch.cuda.is_available()):
            raise SystemExit(f"benchmarks/{self.script or self.name}.py measures a GPU, and PyTorch finds none here")
        self.free_before = round(torch.cuda.mem_get_info()[0] / GIB, 1) if torch.cuda.is_available() else None

    def add(self, figure: str, value: float, unit: str, better: str, **more: Any) -> None:
        """Note a figure, instead of an earlier one of its name.

        `more` holds bar, bar_is, peers, repeats, spread and what else explains it.
        """
        self.rows = [row for row in self.rows if row["figure"] != figure]
        self.rows.append({"figure": figure, "value": round(value, 5), "unit": unit, "better": better} | more)
        self.write()  # a run that is cut off keeps what it has measured
        bar = f"   bar {more['bar']}" if more.get("bar") is not None else ""
        print(f"{figure:52} {value:12.4f} {unit}{bar}", flush=True)

    def write(self) -> Path:
        """Write the file and return its path."""
        packages = ("torch", "triton", "vllm", "transformers", "trl", "peft")
        versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
        content = {
            "script": f"benchmarks/{self.script or self.name}.py",
            "commit": self.options.commit or commit(),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
            "free_gib_before": self.free_before,
            "versions": versions,
            "rows": self.rows,
        }
        directory: Path = self.options.results
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def commit() -> str:
    """The commit that is measured, or empty where the tree is not a git checkout."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


def run_apart(label: str, script: str, *options: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a benchmark's script in a process of its own, which frees the card; what the JSON in its last line says."""
    command = [sys.executable, script, *options]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | dict(environment or {}), check=True
    )
    last = result.stdout.splitlines()[-1]
    print(f"{label:13} {last}", flush=True)
    return json.loads(last)


def best_of(run: Any, repeats: int) -> tuple[float, float]:
    """(fastest seconds, spread: slowest over fastest less 1) of calling `run`, the card waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times), max(times) / min(times) - 1


def matmul_roof() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product of random bf16 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = 20
    seconds, _ = best_of(lambda: [a @ b for _ in range(times)], 5)
    return times * 2 * 8192**3 / seconds
