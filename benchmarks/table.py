"""The figures of benchmarks/results/*.json as a markdown page; `--write` puts it into docs/measured.md."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("figure", "value", "unit", "bar", "", "the bar is", "peers")
TITLE = """# Measured

A section a file of `benchmarks/results/`, which the script that it names wrote. A bar is what we set out to reach; one
that was missed stays here. Peers were measured in the same run. `python benchmarks/table.py --write` makes the page."""


def verdict(row: dict[str, Any]) -> str:
    """`met` or `missed`; nothing where a figure has no bar."""
    if row.get("bar") is None:
        return ""
    value, bar = row["value"], row["bar"]
    met = {"higher": value >= bar, "lower": value <= bar, "equal": value == bar}[row["better"]]
    return "met" if met else "missed"


def section(path: Path) -> str:
    """A file's figures, a row each, below when and on what they were measured."""
    content = json.loads(path.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    origin = f"`{content['script']}`, {content['date']}, {content['device']}, commit {content['commit'] or 'unknown'}"
    parts = [f"## {path.stem}", f"{origin}; {versions}."]
    if path.with_suffix(".png").exists():
        parts.append(f"![{path.stem}](../benchmarks/results/{path.stem}.png)")
    rows = [_row(row) for row in content["rows"]]
    return "\n\n".join([*parts, "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *rows])])


def _row(row: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {_number(value)}" for name, value in (row.get("peers") or {}).items())
    bar = "" if row.get("bar") is None else _number(row["bar"])
    cells = [
        f"`{row['figure']}`",
        _number(row["value"]),
        row["unit"],
        bar,
        verdict(row),
        row.get("bar_is") or "",
        peers,
    ]
    return _line(cells)


def _number(value: Any) -> str:
    """Four digits, or all those before the point."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(results: Path) -> str:
    sections = [section(path) for path in sorted(results.glob("*.json"))]
    return "\n\n".join([TITLE, *(sections or ["Nothing yet."])]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=ROOT / "docs" / "measured.md", metavar="FILE", help="docs/measured.md"
    )
    options = parser.parse_args(arguments)
    if options.write is None:
        print(page(options.results), end="")
    else:
        options.write.write_text(page(options.results))


if __name__ == "__main__":
    main()
