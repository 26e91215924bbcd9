"""The profile's figures as tables and lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from accel.cli import console
from accel.stages.profile import COPIES, DECODE, describe

NAMED = 3  # nodes that a printed line names


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row an operator, longest first: name, milliseconds, percent, calls, nodes."""
    slowest = sorted(summary["operators"].items(), key=lambda item: -item[1]["seconds"])[: summary["point"]["top"]]
    return [
        [
            name,
            f"{1000 * usage['seconds']:.2f}",
            f"{100 * usage['seconds'] / summary['seconds']:.1f}",
            str(usage["calls"]),
            str(usage["nodes"]),
        ]
        for name, usage in slowest
    ]


def off_device_lines(path: str, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of one path of the decoder the CPU does and what is copied: a line for each, the first few nodes named."""
    kinds = [("on the CPU", [node for node in nodes if node["operator"] not in COPIES])]
    kinds += [(copy, [node for node in nodes if node["operator"] == copy]) for copy in COPIES]
    when = "per token" if path == DECODE else "once"
    lines = []
    for kind, found in kinds:
        calls = sum(node["calls"] for node in found)
        named = ", ".join(f"{node['name']} ({node['operator']})" for node in found[:NAMED])
        more = ", …" if len(found) > NAMED else ""
        listed = f": {named}{more}" if found else ""
        lines.append(f"decoder, {path}: {len(found)} nodes {kind}, {calls:.1f} calls {when}{listed}")
    return lines


def show(summary: Mapping[str, Any]) -> None:
    """Print the slowest operators, the nodes on each provider, and the copies."""
    console.table(f"Profile: {describe(summary)}", ("operator", "ms", "%", "calls", "nodes"), rows(summary))
    for name, usage in summary["providers"].items():
        console.out.print(f"{name}: {usage['nodes']} nodes, {usage['calls']} calls, {1000 * usage['seconds']:.1f} ms")
    for path, nodes in summary.get("off_device", {}).items():
        for line in off_device_lines(path, nodes):
            console.out.print(line, markup=False)
    copies = ", ".join(f"{count} {name}" for name, count in summary["copies"].items())
    console.out.print(f"copies between host and device: {copies}")
