"""The certificate: what was compared with PyTorch, on what, and what came out. It lies beside the model's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.artifacts import Artifact, versions
from accel.certificate import page
from accel.graph.minimise import TRIABLE
from accel.machine import commit, machine
from accel.runtime import layout
from accel.schema import Config

PACKAGES = ("accel", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "sacrebleu")


def write(
    out: Path,
    verdict: Mapping[str, Any],
    speed: Mapping[str, Any] | None,
    config: Config,
    inputs: Mapping[str, Artifact],
) -> None:
    """Write `certificate.json` and `certificate.html` into `out`, which holds the deployable."""
    certificate = gather(verdict, speed, config, inputs)
    (out / layout.CERTIFICATE).write_text(json.dumps(certificate, indent=1))
    (out / layout.CERTIFICATE_PAGE).write_text(page.render(certificate), encoding="utf-8")


def gather(
    verdict: Mapping[str, Any], speed: Mapping[str, Any] | None, config: Config, inputs: Mapping[str, Artifact]
) -> dict[str, Any]:
    """The content of `certificate.json`. `speed`: what `accel.speed.beside_torch` measured."""
    verify, checkpoint = config.verify, inputs["checkpoint"]
    made = {name: artifact.key for name, artifact in inputs.items()}
    return {
        "model": config.model.name,
        "weights": config.model.weights,
        "checkpoint": {"key": checkpoint.key, "commit": _hub_commit(checkpoint.folder)},
        "commit": commit(),
        "packages": {name: version for name, version in versions(PACKAGES).items() if version != "absent"},
        "machine": machine(config),
        "made_from": made,
        "compared": {
            "inputs": verdict["inputs"],
            "kind": "texts" if verdict["samples"] else "random ids",
            "max_new_tokens": verify.max_new_tokens,
            "num_beams": verify.num_beams,
            "batch_size": verify.batch_size,
            "seed": verify.seed,
        },
        "verdict": dict(verdict),
        "speed": speed,
        **(_mix(inputs) if "audit" in inputs else {}),
    }


def _hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot from the Hugging Face hub, whose cache names folders by it."""
    return folder.name if folder.parent.name == "snapshots" else None


def _mix(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What stayed in FP32 and why, and what every value was seen to hold."""
    from accel.stages.audit import read_plans
    from accel.stages.ranges import read_ranges

    plans = read_plans(inputs["audit"].folder)
    ranges, rows = read_ranges(inputs["ranges"].folder)
    kept = []
    for role, plan in plans.items():
        for name, reason in plan.nodes.items():
            held = ranges[role].get(reason.value)
            source = held.source if held is not None and reason.rule in TRIABLE else None
            kept.append(
                {
                    **{"role": role, "node": name, "rule": reason.rule, "value": reason.value},
                    "largest": held.largest if held is not None else reason.largest,
                    "smallest": held.smallest if held is not None else reason.smallest,
                    "overflow": held.overflow / held.elements if held is not None and held.elements else None,
                    "source": rows[source[0]][source[1] or 0] if source is not None else None,
                }
            )
    return {
        "mix": inputs["convert"].summary,
        "plan": inputs["audit"].summary,
        "audited": inputs["ranges"].summary,
        "kept": kept,
        "ranges": {
            role: {name: [held.largest, held.smallest] for name, held in values.items()}
            for role, values in ranges.items()
        },
    }
