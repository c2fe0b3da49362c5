"""benchmarks/algorithms.py around its runs: what is finished is kept, and a failure costs nothing else."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def algorithms(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmarks_algorithms", root / "benchmarks" / "algorithms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "warm_up", lambda directory, seed: directory)
    return module


class Workers:
    """Stands for the processes: notes which run was started, and leaves its result, or fails."""

    def __init__(self, benchmark: ModuleType, work: Path, failing: set[tuple[str, int]]):
        self.benchmark, self.work, self.failing = benchmark, work, failing
        self.started: list[tuple[str, int]] = []
        self.real_run = subprocess.run

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess:
        if "--one" not in command:  # a library's
            return self.real_run(command, **options)
        preset, seed = command[command.index("--one") + 1], int(command[command.index("--one") + 2])
        self.started.append((preset, seed))
        if (preset, seed) in self.failing:
            return subprocess.CompletedProcess(command, 1)
        made_of = {
            name: command[command.index(f"--{name.replace('_', '-')}") + 1] for name in ("steps", "engine", "commit")
        }
        settings = {
            "preset": preset, "seed": seed, "learning_rate": 7e-4, "given": self.benchmark.SMALL.get(preset, {}),
        }  # fmt: skip
        result = {
            "settings": settings | made_of | {"steps": int(made_of["steps"])}, "before": 0.4, "after": 0.9,
            "seconds": 1.0, "updates_per_generation": 1, "set_by_preset": {"algorithm": preset},
            "curve": [[0, 0.4], [20, 0.9]],
        }  # fmt: skip
        self.work.mkdir(exist_ok=True)
        (self.work / f"{preset}-seed{seed}.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, 0)


def test_finished_runs_are_kept_and_only_failed_ones_run_again(
    algorithms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(algorithms, tmp_path / "work", {("gspo", 1)})
    monkeypatch.setattr(algorithms.subprocess, "run", workers.run)
    arguments = ["algorithms.py", "--presets", "grpo", "gspo", "--seeds", "0", "1", "--jobs", "2", "--commit", "abc"]
    arguments += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", arguments)

    assert algorithms.main() == 1
    rows = json.loads((tmp_path / "results" / "algorithms.json").read_text())["rows"]
    figures = {row["figure"]: (row["value"], row["bar"], row["curve"]) for row in rows}
    assert list(figures) == ["algorithms.grpo.seed0", "algorithms.grpo.seed1", "algorithms.gspo.seed0"]
    assert figures["algorithms.gspo.seed0"] == (0.9, algorithms.BAR, [[0, 0.4], [20, 0.9]])
    assert (tmp_path / "results" / "algorithms.png").stat().st_size > 10_000

    workers.failing, workers.started = set(), []
    assert algorithms.main() == 0
    assert workers.started == [("gspo", 1)]

    workers.started = []
    monkeypatch.setattr("sys.argv", [*arguments, "--steps", "20"])  # another run, not the one that is finished
    assert algorithms.main() == 0
    assert len(workers.started) == 4
