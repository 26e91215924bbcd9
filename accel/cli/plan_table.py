"""Table of a decode step's plan."""

from collections.abc import Mapping
from typing import Any

from accel.cli import console

COLUMNS = ("operation", "what it computes", "output", "runs in", "weight bytes", "offset")


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per operation, in order; nodes that run in torch one after another are one.

    Args:
        summary: Summary of the stage `plan`.
    """
    return [
        [
            row["operation"],
            row["description"],
            row["shape"],
            row["engine"],
            f"{row['weight_bytes']:,}" if row["weight_bytes"] else "",
            "" if row["offset"] is None else f"{row['offset']:,}",
        ]
        for row in summary["rows"]
    ]


def describe(summary: Mapping[str, Any]) -> str:
    """Return one line on the lengths that the offsets are for, and on what is fused."""
    point = summary["point"]
    return (
        f"one token of {point['batch_size']} rows, caches of {point['cache_length']}: {summary['operations']} fused "
        f"operations with {summary['fused_share']:.0%} of {summary['product_bytes']:,} bytes of weights, "
        f"{summary['torch_nodes']} nodes in torch, {summary['workspace_bytes']:,} bytes between them"
    )


def show(summary: Mapping[str, Any]) -> None:
    """Print the operations, and why a product or a softmax is in none.

    Args:
        summary: Summary of the stage `plan`.
    """
    console.table(f"Plan: {describe(summary)}", COLUMNS, rows(summary), text_columns=4)
    for name, reason in summary["misses"].items():
        console.out.print(f"not fused: {name}: {reason}", markup=False)
