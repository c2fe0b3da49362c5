"""Figures against the number of tokens, a panel an op, with the measured roof as a line."""

from math import ceil
from pathlib import Path

Panels = dict[str, dict[str, list[tuple[int, float]]]]  # title: {who: [(tokens, value)]}
COLUMNS = 4


def plot_panels(path: Path, panels: Panels, unit: str, roof: float, roof_name: str) -> None:
    """Write a PNG; ours is drawn on top and in black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.6 * columns, 2.8 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    names = sorted({who for lines in panels.values() for who in lines} - {"ours"})
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for who, points in lines.items():
            ours = who == "ours"
            color = "black" if ours else f"C{names.index(who)}"
            axis.plot(
                *zip(*sorted(points), strict=True),
                label=who,
                color=color,
                marker="o",
                markersize=3,
                zorder=3 if ours else 2,
            )
        axis.axhline(roof, color="gray", linestyle="--", linewidth=1, label=roof_name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel(unit)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
