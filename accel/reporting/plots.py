"""Plots, drawn without a display. Each function writes a PNG file."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import nan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import seaborn
from matplotlib import pyplot
from matplotlib.axes import Axes

SIZE = (9.0, 5.0)  # inches


def latency(positions: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Plot the latency of each token by position, one line per backend.

    Args:
        positions: Backend -> seconds per token, by position.
        title: Title of the plot.
        path: PNG file to write.
    """
    milliseconds = {name: [1000 * value for value in values] for name, values in positions.items()}
    _lines(milliseconds, title, "latency of the token (ms)", path, logarithmic=True)


def accumulated(positions: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Plot the seconds from the start to each token, one line per backend.

    Args:
        positions: Backend -> seconds per token, by position.
        title: Title of the plot.
        path: PNG file to write.
    """
    _lines({name: list(accumulate(values)) for name, values in positions.items()}, title, "accumulated time (s)", path)


def operators(seconds: Mapping[str, float], title: str, path: Path) -> None:
    """Plot one bar per operator.

    Args:
        seconds: Operator -> seconds, in the order of the bars.
        title: Title of the plot.
        path: PNG file to write.
    """
    axes = _axes(title, "time (ms)", "")
    seaborn.barplot(x=[1000 * value for value in seconds.values()], y=list(seconds), ax=axes, color="steelblue")
    _save(axes, path)


def sweep(points: Sequence[Mapping[str, Any]], x: str, y: str, hue: str, panel: str, title: str, path: Path) -> None:
    """Plot `y` over `x`: one line per value of `hue`, one panel per value of `panel`.

    Args:
        points: Records with the keys `x`, `y`, `hue` and `panel`.
        x: Key of the horizontal axis.
        y: Key of the vertical axis.
        hue: Key that distinguishes lines.
        panel: Key that distinguishes panels.
        title: Title of the plot.
        path: PNG file to write.
    """
    columns = {name: [point[name] for point in points] for name in (x, y, hue, panel)}
    seaborn.set_theme(style="whitegrid")
    count = len(set(columns[panel]))
    facets = seaborn.relplot(
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
    facets.set_titles("{col_name}")
    facets.set(ylim=(0, None))
    facets.figure.suptitle(title, fontsize=10, y=1.02)
    facets.savefig(path, dpi=120)
    pyplot.close(facets.figure)


def grid(points: Sequence[Mapping[str, Any]], x: str, y: str, value: str, title: str, path: Path) -> None:
    """Plot a heat map of `value`, with one cell for every pair of `x` and `y`.

    Args:
        points: Records with the keys `x`, `y` and `value`.
        x: Key of the columns.
        y: Key of the rows.
        value: Key of the number in a cell.
        title: Title of the plot.
        path: PNG file to write.
    """
    columns = sorted({point[x] for point in points})
    rows = list(dict.fromkeys(point[y] for point in points))
    cells = {(point[y], point[x]): point[value] for point in points}
    values = [[cells.get((row, column), nan) for column in columns] for row in rows]
    seaborn.set_theme(style="white")
    _, axes = pyplot.subplots(figsize=(4 + 1.2 * len(columns), 2 + 0.8 * len(rows)))
    seaborn.heatmap(values, annot=True, fmt=".2f", cmap="viridis", xticklabels=columns, yticklabels=rows, ax=axes)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(axis="y", rotation=0)
    _save(axes, path)


def comparison(panels: Mapping[str, Mapping[str, float]], labels: Sequence[str], title: str, path: Path) -> None:
    """Plot one panel of bars per figure, one bar per label, with its number beside it.

    Args:
        panels: Figure with its unit -> label -> number. A label without a number has no bar.
        labels: Labels in the order of the bars.
        title: Title of the plot.
        path: PNG file to write.
    """
    seaborn.set_theme(style="whitegrid")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.8 + 0.35 * len(labels)
    figure, grid_axes = pyplot.subplots(rows, columns, figsize=(4 * columns, height * rows + 0.5), squeeze=False)
    for axes, (name, numbers) in zip(grid_axes.flat, panels.items(), strict=False):
        bars = axes.barh(list(labels), [numbers.get(label, 0.0) for label in labels], color="steelblue")
        texts = [f"{numbers[label]:.3g}" if label in numbers else "not measured" for label in labels]
        axes.bar_label(bars, texts, padding=3)
        axes.set_title(name, fontsize=10)
        axes.margins(x=0.3)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    for axes in list(grid_axes.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(
    values: Mapping[str, Sequence[float]], title: str, label: str, path: Path, *, logarithmic: bool = False
) -> None:
    """Plot one line per entry of `values` over the position of the token."""
    axes = _axes(title, "token", label)
    for name, series in values.items():
        seaborn.lineplot(x=range(1, len(series) + 1), y=list(series), label=name, ax=axes)
    if logarithmic:  # the first token includes encoder and prefill, and would flatten the rest
        axes.set_yscale("log")
    _save(axes, path)


def _axes(title: str, x: str, y: str) -> Axes:
    """Return axes for a plot in a file of its own."""
    seaborn.set_theme(style="whitegrid")
    _, axes = pyplot.subplots(figsize=SIZE)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _save(axes: Axes, path: Path) -> None:
    """Write the figure as PNG and close it."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise RuntimeError("axes without a figure")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
