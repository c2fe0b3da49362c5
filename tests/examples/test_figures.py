"""The table of figures, made from what the benchmarks wrote."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

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


@pytest.fixture
def table(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_table", root / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
