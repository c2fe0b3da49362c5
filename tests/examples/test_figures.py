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
        {"figure": "decode.tok_s", "value": 6300.4, "unit": "tok/s", "better": "higher", "bar": 6188, "bar_is": "peer"},
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
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| `decode.tok_s` | 6300 | tok/s | 6188 | peer | met | `decode.py` |",
        "| `decode.ms` | 5.1 | ms | 5 | 5 ms | missed | `decode.py` |",
        "| `decode.gap` | 0.001235 | nats |  |  |  | `decode.py` |",
        "",
        "- `benchmarks/decode.py`: 2026-01-02, a card, commit abc; torch 2.13.0",
    ]


def test_the_table_goes_between_the_marks(table: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n")
    table.main(["--results", str(tmp_path), "--write", str(page)])
    assert page.read_text() == f"a\n{table.BEGIN}\nNothing yet.\n{table.END}\nb\n"
    with pytest.raises(ValueError, match="needs the lines"):
        table.with_table("no marks", "")


def test_the_readme_has_the_figures_that_were_measured(table: ModuleType, root: Path) -> None:
    text = (root / "README.md").read_text()
    figures = table.table(root / "benchmarks" / "results")
    assert table.with_table(text, figures) == text, "run `python benchmarks/table.py --write`"
