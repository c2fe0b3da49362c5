"""Peak memory does not grow unnoticed."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("peft")


@pytest.fixture
def baseline(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location("memory_baseline", root / "benchmarks" / "memory_baseline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_growth_and_cases_without_a_baseline_are_reported(baseline: ModuleType, capsys: pytest.CaptureFixture) -> None:
    before = {"a": 1000.0, "b": 1000.0, "c": 1000.0}
    grown = baseline.compare({"a": 1010.0, "b": 1011.0, "c": 980.0, "d": 5.0}, before)
    assert [line.split(":")[0] for line in grown] == ["b", "d"]
    assert "c has shrunk" in capsys.readouterr().out


@pytest.mark.gpu
def test_no_case_takes_over_a_percent_more_than_it_did(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, root / "benchmarks" / "memory_baseline.py"], capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stdout + run.stderr
