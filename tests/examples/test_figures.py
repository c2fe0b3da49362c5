"""The files that benchmarks write, and the table of figures made from them."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

RESULT = {
    "script": "benchmarks/decode.py",
    "commit": "abc",
    "date": "2026-01-02",
    "device": "a card",
    "versions": {"torch": "2.13.0"},
    "rows": [
        {
            "figure": "decode.tok_s",
            "value": 6300.4,
            "unit": "tok/s",
            "better": "higher",
            "bar": 6188,
            "bar_is": "peer",
            "peers": {"vllm": 2382.4, "trl": float("nan")},
        },
        {"figure": "decode.ms", "value": 5.1, "unit": "ms", "better": "lower", "bar": 5, "bar_is": "5 ms"},
        {"figure": "decode.gap", "value": 0.00123456, "unit": "nats", "better": "lower"},
    ],
}


def benchmark(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", root / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(root: Path) -> ModuleType:
    return benchmark(root, "table")


def test_a_figure_a_row_with_its_verdict(table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "decode.json").write_text(json.dumps(RESULT))
    table.main(["--results", str(tmp_path)])
    assert capsys.readouterr().out.split("## decode\n\n")[1].splitlines() == [
        "`benchmarks/decode.py`, 2026-01-02, a card, commit abc; torch 2.13.0.",
        "",
        "| figure | value | unit | bar |  | the bar is | peers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `decode.tok_s` | 6300 | tok/s | 6188 | met | peer | vllm 2382, trl nan |",
        "| `decode.ms` | 5.1 | ms | 5 | missed | 5 ms |  |",
        "| `decode.gap` | 0.001235 | nats |  |  |  |  |",
    ]


@pytest.mark.parametrize(
    ("value", "better", "expected"),
    [(2, "higher", "met"), (0, "higher", "missed"), (0, "lower", "met"), (1, "equal", "met"), (0, "equal", "missed")],
)
def test_a_bar_is_met(table: ModuleType, value: float, better: str, expected: str) -> None:
    assert table.verdict({"value": value, "better": better, "bar": 1}) == expected


def test_a_plot_is_shown(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text(json.dumps(RESULT))
    (tmp_path / "decode.png").touch()
    table.main(["--results", str(tmp_path), "--write", str(tmp_path / "page.md")])
    assert "![decode](../benchmarks/results/decode.png)" in (tmp_path / "page.md").read_text()


def test_no_figures(table: ModuleType, tmp_path: Path) -> None:
    assert table.page(tmp_path) == f"{table.TITLE}\n\nNothing yet.\n"


def test_the_page_has_the_figures_that_were_measured(table: ModuleType, root: Path) -> None:
    page = (root / "docs" / "measured.md").read_text()
    assert page == table.page(root / "benchmarks" / "results"), "run `python benchmarks/table.py --write`"


def test_a_card_s_figures_need_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = importlib.import_module("common")
    options = Namespace(results=tmp_path, commit="abc")
    with pytest.raises(SystemExit, match="benchmarks/decode.py measures a GPU, and PyTorch finds none here"):
        common.Report("decode_8b", options, script="decode")
    assert common.Report("reward_pool", options, on_cpu=True).free_before is None


def test_the_errors_of_fp4_alone_have_a_file_of_their_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured without a card, they do not take the place of its figures."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    fp4 = benchmark(root, "fp4")
    monkeypatch.setattr(fp4, "SIZE", 64)
    monkeypatch.setattr(sys, "argv", ["fp4.py", "--errors", "--results", str(tmp_path)])
    fp4.main()
    (written,) = tmp_path.iterdir()
    content = json.loads(written.read_text())
    assert (written.name, content["script"]) == ("fp4_errors.json", "benchmarks/fp4.py")
    assert "fp4.quantisation_error.gaussian" in {row["figure"] for row in content["rows"]}
