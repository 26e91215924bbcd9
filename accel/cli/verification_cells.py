"""Cells of a sweep's table with the results of `verify`, and the figures of its plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from accel.benchmark.backends import BASELINE
from accel.cli.benchmark_table import times
from accel.config.engines import FUSED

EMULATED = "emulated"
NOTE = (
    "Metrics: in brackets those of PyTorch in FP32. `as PyTorch`: share of sequences identical to PyTorch's. "
    "`logits off by`: largest absolute error of the logits along the sequences that PyTorch generated."
)
LOW_BIT_NOTE = (
    "`low bits`: share of the products' weight bytes in low bits, in the component with the least. `divergence`: mean "
    "Kullback-Leibler divergence of the next token's distribution from PyTorch's, ± its standard error, in nats. In "
    "brackets after a share of sequences: with those that differ first at a near tie of PyTorch's."
)
EMULATION_NOTE = (
    "emulated: this runtime has no operators for the precision. Tokens and metrics are those of an emulation in FP32. "
    "For speed and memory run the sweep on a GPU."
)
SESSION_NOTE = "`session MB`: memory that the decoder's sessions hold after a prefill and four decode steps of one row."


def cells(verify: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the cells with the results of `verify`, by column, for bundles that passed or failed; empty if not run."""
    if verify is None:
        return {}
    worst = verify["worst_logits"]
    engine = f", {FUSED}" if verify.get("engine") == FUSED else ""
    row = {"passed": f"{'yes' if verify['passed'] else 'no'}, {verify['execution']}{engine}"}
    for name, share in verify["identical"].items():
        tied = verify["near_ties"].get(name, 0) / verify["sequences"][name] if verify.get("near_ties") else 0
        row[f"{name} as PyTorch"] = f"{share:.1%}" + (f" ({share + tied:.1%})" if tied else "")
    row["logits off by"] = "not finite" if worst is None else f"{worst:.1e}"
    for name, score in verify["metrics"].get("ours", {}).items():
        row[name.replace("_", " ")] = f"{score:.2f}% ({verify['metrics']['pytorch'][name]:.2f}%)"
    if divergence := verify.get("divergence"):
        row["divergence"] = f"{divergence['mean']:.2g} ± {divergence['standard_error']:.1g}"
    if verify.get("low_bit_share") is None:
        row["nodes in FP32"], row["casts"] = str(verify["fp32_nodes"]), str(verify["casts"])
    else:
        row["low bits"] = f"{verify['low_bit_share']:.1%}"
    row["decoder MB"] = f"{verify['decoder_bytes'] / 1e6:.1f}"
    return row | _measured_cells(verify)


def _measured_cells(verify: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells with memory and speed."""
    figures = _accelerated(verify)
    if figures is None:
        return {}
    row = {}
    if "session_memory" in figures:
        row["session MB"] = f"{figures['session_memory'] / 1e6:.1f}"
    return row | {"seconds": times(figures["seconds"], figures), "x PyTorch": f"{verify['speed']['ratio']:.2f}"}


def _accelerated(verify: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the deployable's figures of speed and memory; None where they aren't measured, or say nothing."""
    if verify["speed"] is None or verify["execution"] == EMULATED:
        return None
    backends: Mapping[str, Mapping[str, Any]] = verify["speed"]["backends"]
    return next(figures for name, figures in backends.items() if name != BASELINE)


def figures(verify: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures that a plot compares precisions by, with their units as names; those that are known."""
    known = {"decoder weights (MB)": verify["decoder_bytes"] / 1e6}
    measured = _accelerated(verify)
    if measured is not None and "session_memory" in measured:
        known["decoder session (MB)"] = measured["session_memory"] / 1e6
    if measured is not None:
        known["generation (ms)"] = 1000 * measured["seconds"]["median"]
    if verify["identical"]:
        known["identical sequences, greedy (%)"] = 100 * verify["identical"].get("padded", 0.0)
    for name, score in verify["metrics"].get("ours", {}).items():
        known[f"{name.replace('_', ' ')} (%)"] = score
    if divergence := verify.get("divergence"):
        known["divergence (nats)"] = divergence["mean"]
    return known


def notes(verified: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the paragraphs that explain the columns of these results of `verify`."""
    paragraphs = [NOTE] if verified else []
    if any(verify.get("low_bit_share") is not None for verify in verified):
        paragraphs.append(LOW_BIT_NOTE)
    if any("session MB" in cells(verify) for verify in verified):
        paragraphs.append(SESSION_NOTE)
    if any(verify["execution"] == EMULATED for verify in verified):
        paragraphs.append(EMULATION_NOTE)
    return paragraphs
