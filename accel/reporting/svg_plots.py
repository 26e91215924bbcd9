"""Plots for an HTML page, as SVG.

Unlike `accel.reporting.plots` it imports neither seaborn nor pyplot, which take 90 MB of memory.
"""

from collections.abc import Mapping, Sequence
from io import StringIO
from math import isfinite, nan

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NARROW = (4.8, 3.2)  # inches; at this width, text of 8 points is legible on a phone


def value_ranges(
    statistics: Sequence[tuple[float, float]],
    limits: Mapping[str, float],
    title: str,
    x: str = "value, in the graph's order",
) -> str:
    """Plot one bar per value, from its smallest to its largest magnitude, with lines at the limits of a format.

    Values beyond the largest limit are red; infinite ones reach the top.

    Args:
        statistics: (smallest, largest) magnitude of each value.
        limits: Label -> magnitude at which a line is drawn.
        title: Title of the plot.
        x: Label of the horizontal axis.

    Returns:
        An SVG element, narrow enough for a phone.
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
    """Plot the error of the logits over the position of the token, one line per statistic.

    Args:
        lines: Label -> error by position; None leaves a gap.
        title: Title of the plot.

    Returns:
        An SVG element, narrow enough for a phone.
    """
    axes = _narrow(title, "token", "absolute error of the logits")
    for name, series in lines.items():
        heights = [nan if value is None else value for value in series]
        axes.plot(range(1, len(series) + 1), heights, label=name, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _svg(axes)


def _narrow(title: str, x: str, y: str) -> Axes:
    """Return axes for a narrow plot on an HTML page."""
    figure = Figure(figsize=NARROW, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return axes


def _svg(axes: Axes) -> str:
    """Return the figure as an SVG element; the same data gives the same text."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise RuntimeError("axes without a figure")
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": axes.get_title()}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    document = buffer.getvalue()
    return document[document.index("<svg") :]  # without the XML declaration
