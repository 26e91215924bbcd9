"""What the command line shows when the stages are done: the folder, the verdict, texts side by side, the figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.cli import benchmark_table, console, profile_table
from accel.config.schema import Config
from accel.models.loading import verification_of
from accel.pipeline.runner import RESULTS
from accel.pipeline.store import Artifact
from accel.runtime import layout
from accel.stages import generate

SHOWN = 5  # texts


def finish(config: Config, artifacts: Mapping[str, Artifact]) -> None:
    """Print what the finished stages found, to standard output."""
    if "optimize" in artifacts:
        _nodes(artifacts["optimize"].summary["nodes"])
    if "audit" in artifacts:
        _plan(artifacts["audit"].summary)
    if "merge" in artifacts:
        _sharing(artifacts["merge"].summary)
    if (artifact := artifacts.get("verify")) is not None:
        _verdict(verification_of(artifact.folder) or {}, artifact.folder / layout.CERTIFICATE_PAGE)
    if (artifact := artifacts.get("generate")) is not None:
        _texts(config, json.loads((artifact.folder / generate.RESULTS).read_text()))
    if (artifact := artifacts.get("benchmark")) is not None:
        benchmark_table.show(artifact.summary)
    if (artifact := artifacts.get("profile")) is not None:
        profile_table.show(artifact.summary)
    result = next((name for name in RESULTS if name in artifacts), None)
    if result is not None:
        what = {"verify": "deployable", "merge": "candidate, unverified"}[result]
        console.out.print(f"{what}: {artifacts[result].folder}", style="bold", markup=False)


def _nodes(counts: Mapping[str, Mapping[str, int]]) -> None:
    components = list(counts["exported"])
    console.table(
        "nodes after each pass", ("pass", *components), [[name, *found.values()] for name, found in counts.items()]
    )


def _plan(summary: Mapping[str, Any]) -> None:
    steps = summary["sizes"]
    rows = [
        [component, *(_mix(mixes[component]) for mixes in steps.values())] for component in next(iter(steps.values()))
    ]
    console.table(f"left in FP32 by {summary['format']}: nodes, casts, weights", ("graph", *steps), rows)
    rules = dict.fromkeys(rule for found in summary["rules"].values() for rule in found)
    for rule in rules:
        counts = ", ".join(
            f"{component} {found[rule]}" for component, found in summary["rules"].items() if rule in found
        )
        console.out.print(f"kept because of {rule}: {counts}", markup=False)
    nearest = [
        (each["role"], each["value"], f"{each['largest']:.3g}", each["seen_with"]) for each in summary["nearest"]
    ]
    console.table("largest magnitudes", ("graph", "value", "largest", "seen with"), nearest)


def _mix(mix: Mapping[str, float]) -> str:
    return f"{mix['fp32_nodes']} ({1 - mix['nodes']:.1%}), {mix['casts']}, {mix['fp32_bytes'] / 1e6:.1f} MB"


def _sharing(summary: Mapping[str, Any]) -> None:
    two = summary["decode_bytes"] + summary["prefill_bytes"]
    console.out.print(
        f"merged decoder: {summary['merged_bytes'] / 1e6:.1f} MB of weights where two files take {two / 1e6:.1f} MB; "
        f"{summary['shared_bytes'] / 1e6:.1f} MB shared"
    )


def _verdict(verification: Mapping[str, Any], page: Path) -> None:
    name, worst = max(verification["outputs"].items(), key=lambda item: item[1]["error"])
    own = "unknown" if worst["torch_error"] is None else f"{worst['torch_error']:.1e}"
    rows = [
        ("precision", f"{verification['precision']}, {verification['arithmetic']} on {verification['runtime']}"),
        ("outputs compared", len(verification["outputs"])),
        ("furthest from float64", f"{name}, {worst['where']}"),
        ("  of its largest value", f"{worst['error']:.1e} (allowed {worst['allowed']:.1e}; PyTorch's own {own})"),
    ]
    rows += [(f"same tokens, {name}", f"{share:.0%}") for name, share in verification["identical"].items()]
    for name, theirs in verification["metrics"].get("pytorch", {}).items():
        label = f"{name.replace('_', ' ')}, {verification['references']} references"
        rows.append((label, f"{verification['metrics']['ours'][name]:.2f}% (PyTorch FP32 {theirs:.2f}%)"))
    console.table("verdict: passed" if verification["passed"] else "verdict: refused", ("", "against PyTorch"), rows)
    console.out.print(f"the certificate, to be opened in a browser: {page}", markup=False)
    if verification["samples"]:
        samples = [(s["input"], s["pytorch"], s["ours"]) for s in verification["samples"][:SHOWN]]
        console.table("side by side", ("input", "PyTorch", "ONNX Runtime"), samples)


def _texts(config: Config, results: Mapping[str, list[str]]) -> None:
    if not results["outputs"]:
        return
    if config.generate.get("output") is not None:
        return  # what is written to a file need not be shown
    times = len(results["outputs"]) // len(results["inputs"])
    inputs = [line for line in results["inputs"] for _ in range(times)]
    shown = list(zip(inputs, results["outputs"], strict=True))[: None if "text" in config.generate else SHOWN]
    console.table("generated", ("input", "output"), shown)
