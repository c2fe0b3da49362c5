"""The figures of benchmarks/results/*.json as a markdown table; `--write` puts it into the README."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
COLUMNS = ("figure", "value", "unit", "bar", "the bar is", "", "script")


def verdict(row: dict[str, Any]) -> str:
    """`met` or `missed`; nothing where a figure has no bar."""
    if row.get("bar") is None:
        return ""
    met = row["value"] >= row["bar"] if row["better"] == "higher" else row["value"] <= row["bar"]
    return "met" if met else "missed"


def table(results: Path) -> str:
    """A row a figure, and below it when and on what each script measured."""
    lines, origins = [], []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        measured = f"{content['date']}, {content['device']}, commit {content['commit'] or 'unknown'}; {versions}"
        origins.append(f"- `{content['script']}`: {measured}")
        for row in content["rows"]:
            bar = "" if row.get("bar") is None else f"{row['bar']:.4g}"
            cells = [
                f"`{row['figure']}`",
                f"{row['value']:.4g}",
                row["unit"],
                bar,
                row.get("bar_is") or "",
                verdict(row),
            ]
            lines.append(_line([*cells, f"`{Path(content['script']).name}`"]))
    if not lines:
        return "Nothing yet."
    return "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *lines, "", *origins])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(text: str, figures: str) -> str:
    """`text` with what stands between the two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the text needs the lines {BEGIN} and {END}: the table goes between them")
    return f"{before}{BEGIN}\n{figures}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=ROOT / "README.md", metavar="FILE", help="default: README"
    )
    options = parser.parse_args(arguments)
    figures = table(options.results)
    if options.write is None:
        print(figures)
    else:
        options.write.write_text(with_table(options.write.read_text(), figures))


if __name__ == "__main__":
    main()
