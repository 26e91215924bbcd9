"""The plots. Drawn without a display; every function writes one PNG, or returns SVG for a page."""

from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import accumulate
from math import isfinite, nan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import seaborn
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE = (9.0, 5.0)  # inches
NARROW = (4.8, 3.2)  # inches; text of 8 points stays legible on a phone


def latency(positions: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Seconds a token by position, one line a setup."""
    milliseconds = {name: [1000 * value for value in values] for name, values in positions.items()}
    _lines(milliseconds, title, "latency of the token (ms)", path, logarithmic=True)


def accumulated(positions: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Seconds until each token is there, one line a setup."""
    _lines({name: list(accumulate(values)) for name, values in positions.items()}, title, "accumulated time (s)", path)


def operators(seconds: Mapping[str, float], title: str, path: Path) -> None:
    """A bar an operator, longest first; `seconds` is in that order."""
    axes = _axes(title, "time (ms)", "")
    seaborn.barplot(x=[1000 * value for value in seconds.values()], y=list(seconds), ax=axes, color="steelblue")
    _save(axes, path)


def sweep(points: Sequence[Mapping[str, Any]], x: str, y: str, hue: str, panel: str, title: str, path: Path) -> None:
    """`y` over `x`, one line a `hue`, one panel a value of `panel`. Points are records with these four keys."""
    columns = {name: [point[name] for point in points] for name in (x, y, hue, panel)}
    seaborn.set_theme(style="whitegrid")
    count = len(set(columns[panel]))
    grid = seaborn.relplot(
        columns,
        x=x,
        y=y,
        hue=hue,
        col=panel,
        kind="line",
        marker="o",
        errorbar=None,
        col_wrap=min(3, count),
        height=4,
        facet_kws={"sharey": False},
    )
    grid.set_titles("{col_name}")
    grid.set(ylim=(0, None))
    grid.figure.suptitle(title, fontsize=10, y=1.02)
    grid.savefig(path, dpi=120)
    pyplot.close(grid.figure)


def grid(points: Sequence[Mapping[str, Any]], x: str, y: str, value: str, title: str, path: Path) -> None:
    """A heat map of `value`, a field for every pair of `x` and `y`. Points are records with these three keys."""
    across, down = sorted({point[x] for point in points}), list(dict.fromkeys(point[y] for point in points))
    cells = {(point[y], point[x]): point[value] for point in points}
    values = [[cells.get((row, column), float("nan")) for column in across] for row in down]
    seaborn.set_theme(style="white")
    _, axes = pyplot.subplots(figsize=(4 + 1.2 * len(across), 2 + 0.8 * len(down)))
    seaborn.heatmap(values, annot=True, fmt=".2f", cmap="viridis", xticklabels=across, yticklabels=down, ax=axes)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(axis="y", rotation=0)
    _save(axes, path)


def value_ranges(
    statistics: Sequence[tuple[float, float]],
    limits: Mapping[str, float],
    title: str,
    x: str = "value, in the graph's order",
) -> str:
    """A bar a value from its smallest to its largest magnitude, and lines at `limits`, as SVG. Narrow: for a page.

    What goes beyond the largest limit has another colour; what is infinite reaches the top.
    """
    top = 100 * max(*limits.values(), *(largest for _, largest in statistics if isfinite(largest)))
    axes = _narrow(title, x, "magnitude")
    axes.vlines(
        range(len(statistics)),
        [smallest for smallest, _ in statistics],
        [min(largest, top) for _, largest in statistics],
        color=["steelblue" if largest <= max(limits.values()) else "firebrick" for _, largest in statistics],
        linewidth=0.6,
    )
    axes.set_yscale("log")
    axes.set_ylim(top=top)
    for name, limit in limits.items():
        axes.axhline(limit, color="firebrick", linewidth=1)
        axes.annotate(
            name, (0.01, limit), xycoords=("axes fraction", "data"), fontsize=8, color="firebrick", va="bottom"
        )
    return _svg(axes)


def drift(lines: Mapping[str, Sequence[float | None]], title: str) -> str:
    """One line a statistic over the position of the token, as SVG; None leaves a gap. Narrow: for a page."""
    axes = _narrow(title, "token", "difference of the logits")
    for name, series in lines.items():
        heights = [nan if value is None else value for value in series]
        axes.plot(range(1, len(series) + 1), heights, label=name, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _svg(axes)


def _narrow(title: str, x: str, y: str) -> Axes:
    figure = Figure(figsize=NARROW, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return axes


def _svg(axes: Axes) -> str:
    """The figure as an SVG element; the same for the same data."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise RuntimeError("axes without a figure")
    drawn = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": axes.get_title()}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _lines(
    values: Mapping[str, Sequence[float]], title: str, label: str, path: Path, *, logarithmic: bool = False
) -> None:
    axes = _axes(title, "token", label)
    for name, series in values.items():
        seaborn.lineplot(x=range(1, len(series) + 1), y=list(series), label=name, ax=axes)
    if logarithmic:  # the first token holds the encoder and would flatten the rest
        axes.set_yscale("log")
    _save(axes, path)


def _axes(title: str, x: str, y: str) -> Axes:
    seaborn.set_theme(style="whitegrid")
    _, axes = pyplot.subplots(figsize=SIZE)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _save(axes: Axes, path: Path) -> None:
    figure = axes.get_figure(root=True)
    if figure is None:
        raise RuntimeError("axes without a figure")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
