"""Report that the command line prints after the stages have run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.cli import benchmark_table, console, plan_table, profile_table
from accel.config.schema import Config
from accel.errors import AccelError
from accel.evaluation.metrics import MetricLoss
from accel.evaluation.verification_result import count_sequences, how_verified
from accel.models.loading import verification_of
from accel.pipeline.runner import RESULTS
from accel.pipeline.store import Artifact
from accel.runtime import layout
from accel.stages import generate

SHOWN = 5  # texts


def finish(config: Config, artifacts: Mapping[str, Artifact]) -> None:
    """Print the results of the stages to standard output.

    Args:
        config: Configuration that the stages ran with.
        artifacts: Stage -> artifact, as `accel.cli.compose.execute` returns them.

    Raises:
        AccelError: An input of `generate` has no output. Everything is printed before.
    """
    if "optimize" in artifacts:
        _show_passes(artifacts["optimize"].summary)
    if "audit" in artifacts:
        audited = artifacts["audit"].summary  # of both where weights are of few bits and all else is in 16
        if "weights" in audited:
            _show_weights(audited)
        if "sizes" in audited:
            _show_plan(audited)
    if "merge" in artifacts:
        _show_shared_weights(artifacts["merge"].summary)
    if "verify" in artifacts:
        folder = artifacts["verify"].folder
        _show_verification(verification_of(folder) or {}, layout.first_variant(folder).certificate_page)
        _show_choice(artifacts["verify"].summary.get("choice", []))
    if "generate" in artifacts:
        _show_texts(config, json.loads((artifacts["generate"].folder / generate.RESULTS).read_text()))
    if "benchmark" in artifacts:
        benchmark_table.show(artifacts["benchmark"].summary)
    if "profile" in artifacts:
        profile_table.show(artifacts["profile"].summary)
    if "plan" in artifacts:
        plan_table.show(artifacts["plan"].summary)
    result = next((name for name in RESULTS if name in artifacts), None)
    if result is not None:
        label = {"verify": "deployable", "merge": "unverified bundle"}[result]
        console.out.print(f"{label}: {artifacts[result].folder}", style="bold", markup=False)
    if "generate" in artifacts and artifacts["generate"].summary["refused"]:
        raise AccelError("\n".join(artifacts["generate"].summary["refused"]))


def _show_passes(summary: Mapping[str, Any]) -> None:
    """Print what each graph pass does, and how many nodes it left in each component."""
    counts: Mapping[str, Mapping[str, int]] = summary["nodes"]
    rows: list[list[object]] = []
    before: Mapping[str, int] = {}
    for name, by_component in counts.items():
        cells = [
            f"{nodes} ({nodes - before[component]:+d})" if nodes != before.get(component, nodes) else nodes
            for component, nodes in by_component.items()
        ]
        rows.append([name, summary["descriptions"][name], *cells])
        before = by_component
    columns = ("pass", "what it does", *counts["exported"])
    console.table("nodes after each graph pass that changed a graph", columns, rows, text_columns=2)


def _show_plan(summary: Mapping[str, Any]) -> None:
    """Print the size of the precision plan after each phase of the audit, its rules, and the largest magnitudes."""
    phases = summary["sizes"]  # phase -> component -> mix
    components = list(next(iter(phases.values())))
    rows = [[component, *(_mix(mixes[component]) for mixes in phases.values())] for component in components]
    console.table(f"kept in FP32, the rest in {summary['format']}: nodes, casts, weights", ("graph", *phases), rows)
    counts: dict[str, list[str]] = {}
    for component, rules in summary["rules"].items():
        for rule, count in rules.items():
            counts.setdefault(rule, []).append(f"{component} {count}")
    for rule, texts in counts.items():
        console.out.print(f"kept because of {rule}: {', '.join(texts)}", markup=False)
    largest = [
        (value["component"], value["value"], f"{value['largest']:.3g}", value["seen_with"])
        for value in summary["largest_values"]
    ]
    console.table("largest magnitudes", ("graph", "value", "largest", "seen with"), largest)


def _show_weights(summary: Mapping[str, Any]) -> None:
    """Print how many weights got which format, and the trials that decided it.

    Of a trial: changed tokens, those of them that are no near ties, and divergence ± its standard error.
    """
    console.table("formats of the products' weights", ("format", "weights"), summary["weights"].items())
    rows = [
        [
            trial["weights"],
            f"{trial['changed']} of {trial['greedy_tokens']}",
            f"{trial['clear_changes']}, at most {trial['change_bound']:.1%}",
            f"{trial['divergence']:.2g} ± {trial['standard_error']:.1g} ({trial['tokens']} tokens)",
            f"{trial['error']:.2g}",
            "yes" if trial["passed"] else "no",
        ]
        for trial in summary["trials"]
    ]
    if rows:
        columns = ("in low bits", "tokens changed", "clearly", "divergence in nats", "other outputs", "passed")
        console.table("trials of weights in low bits: differences from FP32", columns, rows)


def _mix(mix: Mapping[str, float]) -> str:
    """Format nodes, casts and bytes of weights in FP32."""
    return f"{mix['fp32_nodes']} ({1 - mix['nodes']:.1%}), {mix['casts']}, {mix['fp32_bytes'] / 1e6:.1f} MB"


def _show_shared_weights(summary: Mapping[str, Any]) -> None:
    """Print the size of the merged decoder's weights beside that of two separate files."""
    two_files = summary["decode_bytes"] + summary["prefill_bytes"]
    console.out.print(
        f"merged decoder: {summary['merged_bytes'] / 1e6:.1f} MB of weights, in two files {two_files / 1e6:.1f} MB; "
        f"{summary['shared_bytes'] / 1e6:.1f} MB are shared by prefill and decode"
    )


def _show_verification(verification: Mapping[str, Any], page: Path) -> None:
    """Print the comparison with PyTorch, the path of the certificate, and some texts of both."""
    name, worst = max(verification["outputs"].items(), key=lambda item: item[1]["error"])
    torch_error = "unknown" if worst["torch_error"] is None else f"{worst['torch_error']:.1e}"
    rows = [
        ("precision", f"{verification['precision']}, {how_verified(verification)}"),
        ("outputs compared", len(verification["outputs"])),
        ("largest error against float64", f"{name}, {worst['location']}"),
        (
            "  relative to largest value",
            f"{worst['error']:.1e} (allowed {worst['allowed']:.1e}; PyTorch {torch_error})",
        ),
    ]
    for name, share in verification["identical"].items():
        agreement = f"{share:.0%} of {verification['sequences'][name]}"
        _, tied, other = count_sequences(verification, name)
        if name in verification["near_ties"] and tied + other:
            agreement += f"; {tied} differ first at a near tie, {other} otherwise"
        rows.append((f"identical sequences, {name}", agreement))
    if divergence := verification.get("divergence"):
        mean, error = f"{divergence['mean']:.2g}", f"{divergence['standard_error']:.1g}"
        label = f"divergence of the next token, {divergence['tokens']} tokens"
        rows.append((label, f"{mean} ± {error} nats (allowed {divergence['allowed']:g})"))
    for name, torch_score in verification["metrics"].get("pytorch", {}).items():
        label = f"{name.replace('_', ' ')}, {verification['references']} references"
        rows.append((label, f"{verification['metrics']['ours'][name]:.2f}% (PyTorch FP32 {torch_score:.2f}%)"))
        rows.append(("  worse by", str(MetricLoss(**verification["metric_losses"][name]))))
    title = "verification passed" if verification["passed"] else "verification failed"
    console.table(title, ("", "compared with PyTorch"), rows)
    console.out.print(f"certificate, for a browser: {page}", markup=False)
    if verification["samples"]:
        shown = verification["samples"][:SHOWN]
        samples = [(sample["input"], sample["pytorch"], sample["ours"]) for sample in shown]
        console.table("side by side", ("input", "PyTorch", "ONNX Runtime"), samples)


def _show_choice(choice: Sequence[Mapping[str, Any]]) -> None:
    """Print which precisions were tried, if several were, and why one was chosen."""
    rows = []
    for candidate in choice:
        seconds, size = candidate["seconds"], candidate["decoder_bytes"]
        rows.append(
            [
                candidate["precision"],
                "chosen" if candidate["chosen"] else candidate["reason"],
                "-" if seconds is None else f"{1000 * seconds['median']:.0f}",
                "-" if size is None else f"{size / 1e6:.1f}",
            ]
        )
    if rows:
        title = "precisions that were tried: greedy generation, in turn"
        console.table(title, ("precision", "", "ms", "decoder MB"), rows, text_columns=2)


def _show_texts(config: Config, results: Mapping[str, list[str]]) -> None:
    """Print generated texts: all for `generate.text`, else the first few; none if they were written to a file."""
    inputs, outputs = results["inputs"], results["outputs"]
    if not outputs or config.generate.get("output") is not None:
        return
    outputs_per_input = len(outputs) // len(inputs)
    repeated_inputs = [line for line in inputs for _ in range(outputs_per_input)]
    pairs = list(zip(repeated_inputs, outputs, strict=True))
    if "text" not in config.generate:
        pairs = pairs[:SHOWN]
    console.table("generated", ("input", "output"), pairs)
