"""Certificate as an HTML page: one file without external resources."""

from collections.abc import Mapping
from math import inf
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from accel.evaluation.verification_result import count_sequences
from accel.graph.precision.formats import FORMATS, FP16

TEMPLATE = "certificate.html.jinja"
DRIFT = {"mean": "mean", "p99": "99th percentile", "worst": "largest", "torch_worst": "PyTorch's largest"}
MAX_ROWS = 200  # of the table of nodes in FP32; the JSON file has all of them
MAX_OUTPUTS = 12  # rows of the table of outputs


def render(certificate: Mapping[str, Any]) -> str:
    """Return the page's HTML.

    Args:
        certificate: Contents of `certificate.json`.
    """
    from accel.reporting import svg_plots  # imports matplotlib, which nothing else needs

    environment = Environment(
        loader=PackageLoader("accel.reporting.certificate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"number": number, "share": share, "megabytes": megabytes, "spread": spread}
    verification = certificate["verification"]
    # The logits come first, because they decide the tokens; then the largest errors.
    outputs = sorted(verification["outputs"].items(), key=lambda item: ("logits" not in item[0], -item[1]["error"]))
    return environment.get_template(TEMPLATE).render(
        certificate=certificate,
        verification=verification,
        outputs=outputs[:MAX_OUTPUTS],
        output_count=len(outputs),
        firsts=_first_differences(verification),
        near_ties=verification["near_ties"],
        counts={name: count_sequences(verification, name) for name in verification["identical"]},
        drift=svg_plots.drift({label: verification["drift"][name] for name, label in DRIFT.items()}, ""),
        statistics=_range_plots(certificate),
        kept=certificate.get("kept", [])[:MAX_ROWS],
        left_out=max(0, len(certificate.get("kept", [])) - MAX_ROWS),
        dtype=verification.get("dtype", verification["precision"]),
        torch_dtype=verification.get("torch_dtype", verification.get("dtype", verification["precision"])),
        weights=_weights(certificate)[:MAX_ROWS],
        weights_left_out=max(0, len(certificate.get("weight_formats", {})) - MAX_ROWS),
    )


def number(value: float | None) -> str:
    """Format a number with three significant digits; None stands for infinity."""
    return "∞" if value is None else f"{value:.3g}"


def share(value: float) -> str:
    """Format a share as a percentage; only 1 becomes 100%."""
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def megabytes(value: float) -> str:
    """Format bytes as megabytes."""
    return f"{value / 1e6:,.1f} MB"


def spread(values: Mapping[str, float] | None, digits: int = 2) -> str:
    """Format median, minimum and maximum with `digits` decimals; a dash if there are none, as in old certificates."""
    if values is None:
        return "-"
    median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} [{low} to {high}]"


def _first_differences(verification: Mapping[str, Any]) -> dict[str, list[int]]:
    """Map each decoding method to the positions of the first different token, one per different sequence, sorted."""
    positions: dict[str, list[int]] = {name: [] for name in verification["identical"]}
    for key, position in verification["first_difference"].items():
        method, _, _ = key.rpartition(".")  # the key is <decoding method>.<number of the input>
        positions[method].append(position)
    return {name: sorted(values) for name, values in positions.items()}


def _weights(certificate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of weights in low bits: those that stay in FP32 first, then by error."""
    rows = []
    for name, choice in certificate.get("weight_formats", {}).items():
        errors, times = choice["errors"], choice["microseconds"]
        shown = choice["format"] or min(errors, key=errors.get, default=None)
        rows.append(
            {
                "name": name,
                "format": choice["format"],
                "reason": choice["reason"],
                "error": errors.get(shown),
                "time": times.get(shown),
                "fp32_time": times.get("float32"),
            }
        )
    return sorted(rows, key=lambda row: (row["format"] is not None, -(row["error"] or 0.0)))


def _range_plots(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Map each component to a plot of its values' magnitudes, in the graph's order, with the format's limits."""
    if "statistics" not in certificate:
        return {}
    from accel.reporting import svg_plots

    verification = certificate["verification"]
    format = FORMATS[verification.get("dtype", verification["precision"])]
    limits = {f"largest {format.name}": format.largest, f"smallest normal {format.name}": format.smallest}
    if format is not FP16:
        limits |= {"largest float16": FP16.largest}
    plots_by_component = {}
    for component, values in certificate["statistics"].items():
        ranges = []
        for largest, smallest in values.values():
            if smallest is not None and largest != 0:  # otherwise the value held only zeros
                ranges.append((smallest, inf if largest is None else largest))
        plots_by_component[component] = svg_plots.value_ranges(ranges, limits, component)
    return plots_by_component
