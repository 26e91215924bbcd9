"""Tables and lines of the profile's results."""

from collections.abc import Mapping, Sequence
from typing import Any

from accel.cli import console
from accel.stages.profile import COPIES, DECODE, describe

NAMED = 3  # nodes listed by name in a printed line


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per operator, longest first: name, milliseconds, percent, calls, nodes.

    Args:
        summary: Summary of the stage `profile`.
    """
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


def off_device_lines(component: str, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines that report a component's nodes on the CPU and its copies between host and device.

    Args:
        component: `prefill` or `decode`.
        nodes: Its nodes off the device, as `accel.stages.profile.Node` in JSON.

    Returns:
        One line for the nodes on the CPU and one for each copy operator. The first `NAMED` nodes are named.
    """
    groups = [("on the CPU", [node for node in nodes if node["operator"] not in COPIES])]
    for copy in COPIES:
        groups.append((copy, [node for node in nodes if node["operator"] == copy]))
    unit = "per token" if component == DECODE else "once"
    lines = []
    for label, members in groups:
        calls = sum(node["calls"] for node in members)
        line = f"decoder, {component}: {len(members)} nodes {label}, {calls:.1f} calls {unit}"
        if members:
            line += ": " + ", ".join(f"{node['name']} ({node['operator']})" for node in members[:NAMED])
        if len(members) > NAMED:
            line += ", …"
        lines.append(line)
    return lines


def show(summary: Mapping[str, Any]) -> None:
    """Print the slowest operators, the nodes on each provider, and the copies.

    Args:
        summary: Summary of the stage `profile`.
    """
    console.table(f"Profile: {describe(summary)}", ("operator", "ms", "%", "calls", "nodes"), rows(summary))
    for name, usage in summary["providers"].items():
        console.out.print(f"{name}: {usage['nodes']} nodes, {usage['calls']} calls, {1000 * usage['seconds']:.1f} ms")
    for component, nodes in summary.get("off_device", {}).items():
        for line in off_device_lines(component, nodes):
            console.out.print(line, markup=False)
    copies = ", ".join(f"{count} {name}" for name, count in summary["copies"].items())
    console.out.print(f"copies between host and device: {copies}")
