"""The certificate: what was compared with PyTorch, on what, and what came out. It lies beside the model's files."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel.adapters.types import Component
from accel.config.schema import Config
from accel.graph.precision.minimize import DROPPABLE
from accel.graph.precision.observer import ValueStatistics
from accel.graph.precision.plan import Plan
from accel.pipeline.store import Artifact
from accel.reporting.certificate import page
from accel.runtime import layout
from accel.system.environment import commit, machine
from accel.system.hashing import DISTRIBUTION, versions

MIXED = {"mix": "convert", "plan": "audit", "audited": "calibrate"}  # whose summaries are about a mix of precisions
PACKAGES = (DISTRIBUTION, "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "sacrebleu")


def write(
    out: Path,
    verification: Mapping[str, Any],
    speed: Mapping[str, Any] | None,
    explained: Mapping[str, Any],
    config: Config,
    inputs: Mapping[str, Artifact],
) -> None:
    """Write `certificate.json` and `certificate.html` into `out`, which holds the deployable.

    `speed`: what `accel.speed.beside_torch` measured; `explained`: what `explain` says of a mix of precisions.
    """
    mixed = {name: inputs[stage].summary for name, stage in MIXED.items()} if explained else {}
    certificate = gather(verification, speed, config, inputs) | mixed | dict(explained)
    (out / layout.CERTIFICATE).write_text(json.dumps(certificate, indent=1, allow_nan=False))
    (out / layout.CERTIFICATE_PAGE).write_text(page.render(certificate), encoding="utf-8")


def gather(
    verification: Mapping[str, Any], speed: Mapping[str, Any] | None, config: Config, inputs: Mapping[str, Artifact]
) -> dict[str, Any]:
    """The content of `certificate.json`, but for what is about a mix of precisions."""
    verify, checkpoint = config.verify, inputs["checkpoint"]
    made = {name: artifact.key for name, artifact in inputs.items()}
    return {
        "model": config.model.name,
        "weights": config.model.weights,
        "checkpoint": {"key": checkpoint.key, "commit": _hub_commit(checkpoint.folder)},
        "commit": commit(),
        "packages": {name: version for name, version in versions(PACKAGES).items() if version != "absent"},
        "machine": machine(config.runtime.device, config.runtime.threads),
        "made_from": made,
        "compared": {
            "inputs": verification["inputs"],
            "kind": "texts" if verification["samples"] else "random ids",
            "max_new_tokens": verify.max_new_tokens,
            "num_beams": verify.num_beams,
            "batch_size": verify.batch_size,
            "seed": verify.seed,
        },
        "verification": dict(verification),
        "speed": speed,
    }


def _hub_commit(folder: Path) -> str | None:
    """The commit of a snapshot from the Hugging Face hub, whose cache names folders by it."""
    return folder.name if folder.parent.name == "snapshots" else None


def explain(
    plans: Mapping[Component, Plan],
    statistics: Mapping[Component, Mapping[str, ValueStatistics]],
    rows: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """What stayed in FP32 and why, and what every value was seen to hold; None is infinite, which JSON can't say.

    `rows`: what each row of each batch was.
    """
    kept = []
    for component, plan in plans.items():
        for name, reason in plan.nodes.items():
            held = statistics[component].get(
                reason.value, ValueStatistics(reason.largest or 0.0, reason.smallest or math.inf)
            )
            kept.append(
                {
                    **{"component": component, "node": name, "rule": reason.rule, "value": reason.value},
                    **{"largest": _finite(held.largest), "smallest": _finite(held.smallest)},
                    "overflow": held.overflow / max(1, held.elements),
                    "source": held.seen_with(rows) if reason.rule in DROPPABLE else "",
                }
            )
    seen = {
        component: {name: [_finite(held.largest), _finite(held.smallest)] for name, held in values.items()}
        for component, values in statistics.items()
    }
    return {"kept": kept, "statistics": seen}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
