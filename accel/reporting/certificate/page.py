"""The certificate as a page: one HTML file that needs no other."""

from collections.abc import Mapping
from math import inf
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from accel.graph.precision.formats import FORMATS, FP16
from accel.reporting import plots

TEMPLATE = "certificate.html.jinja"
DRIFT = {"mean": "mean", "p99": "99th percentile", "worst": "worst", "torch_worst": "PyTorch's worst"}
MOST = 200  # rows of the table of nodes in FP32


def render(certificate: Mapping[str, Any]) -> str:
    """The page for what `gather` returned."""
    pages = Environment(
        loader=PackageLoader("accel.reporting.certificate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    pages.filters |= {"number": number, "share": share, "megabytes": megabytes}
    verification = certificate["verification"]
    # Logits first: tokens are chosen by them.
    outputs = sorted(verification["outputs"].items(), key=lambda item: ("logits" not in item[0], -item[1]["error"]))
    return pages.get_template(TEMPLATE).render(
        certificate=certificate,
        verification=verification,
        outputs=outputs,
        firsts=_firsts(verification),
        drift=plots.drift({label: verification["drift"][name] for name, label in DRIFT.items()}, ""),
        statistics=_range_plots(certificate),
        kept=certificate.get("kept", [])[:MOST],
        left_out=max(0, len(certificate.get("kept", [])) - MOST),
    )


def number(value: float | None) -> str:
    """Three digits, whatever the size; None is infinite."""
    return "∞" if value is None else f"{value:.3g}"


def share(value: float) -> str:
    """Percent; 100% means all."""
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB"


def _firsts(verification: Mapping[str, Any]) -> dict[str, list[int]]:
    """Decoding method -> the positions at which its differing sequences begin to differ, in order."""
    found: dict[str, list[int]] = {name: [] for name in verification["identical"]}
    for key, position in verification["first_difference"].items():
        found[key.rpartition(".")[0]].append(position)
    return {name: sorted(positions) for name, positions in found.items()}


def _range_plots(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Role -> plot of what its values held, in the graph's order, with the limits of the format drawn in."""
    if "statistics" not in certificate:
        return {}
    format = FORMATS[certificate["verification"]["precision"]]
    limits = {f"largest {format.name}": format.largest, f"smallest with all digits, {format.name}": format.smallest}
    if format is not FP16:
        limits |= {"largest float16": FP16.largest}
    drawn = {}
    for component, values in certificate["statistics"].items():
        held = [(low, inf if high is None else high) for high, low in values.values() if low is not None and high != 0]
        drawn[component] = plots.value_ranges(held, limits, component)
    return drawn
