"""Certificate of a deployable: the comparison with PyTorch, its inputs and its results, as JSON and as an HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from accel.adapters.types import Component
from accel.config.schema import Config
from accel.graph.precision.minimize import DROPPABLE
from accel.graph.precision.observer import ValueStatistics
from accel.graph.precision.plan import Plan
from accel.graph.quantization.plan import WeightPlan
from accel.models.checkpoints import hub_commit
from accel.pipeline.store import Artifact
from accel.reporting.card import source_of
from accel.reporting.certificate import page
from accel.runtime.layout import DeployableFiles
from accel.system.environment import commit, machine
from accel.system.hashing import DISTRIBUTION, versions

# Key of the certificate -> stage whose summary it holds, in other precisions than FP32 and where the stage ran.
MIXED = {"mix": "convert", "plan": "audit", "audited": "calibrate"}
PACKAGES = (
    DISTRIBUTION,
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "peft",
    "sacrebleu",
)


def write(
    files: DeployableFiles,
    verification: Mapping[str, Any],
    speed: Mapping[str, Any] | None,
    explained: Mapping[str, Any],
    config: Config,
    inputs: Mapping[str, Artifact],
) -> None:
    """Write `certificate.json` and `certificate.html`, with the suffix of the dtype.

    Args:
        files: Files of the deployable.
        verification: Verification result, as JSON.
        speed: Result of `accel.benchmark.latency.compare_with_torch`; None if it was not measured.
        explained: Result of `explain`; empty in FP32.
        config: Configuration of the stage `verify`.
        inputs: Artifacts that the stage was given.
    """
    mixed = {}
    if explained:
        mixed = {name: inputs[stage].summary for name, stage in MIXED.items() if stage in inputs}
    certificate = gather(verification, speed, config, inputs) | mixed | dict(explained)
    files.certificate.write_text(json.dumps(certificate, indent=1, allow_nan=False))
    files.certificate_page.write_text(page.render(certificate), encoding="utf-8")


def add_choice(files: DeployableFiles, choice: Sequence[Mapping[str, Any]]) -> None:
    """Add to a certificate which precisions were tried and why this one was chosen, in both files.

    Args:
        files: Files of the deployable.
        choice: What `accel.stages.choice` found about each candidate, as JSON.
    """
    contents = json.loads(files.certificate.read_text(encoding="utf-8")) | {"choice": list(choice)}
    files.certificate.write_text(json.dumps(contents, indent=1, allow_nan=False))
    files.certificate_page.write_text(page.render(contents), encoding="utf-8")


def gather(
    verification: Mapping[str, Any], speed: Mapping[str, Any] | None, config: Config, inputs: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Return the contents of `certificate.json` that don't depend on mixed precision.

    Args:
        verification: Verification result, as JSON.
        speed: Result of `accel.benchmark.latency.compare_with_torch`; None if it was not measured.
        config: Configuration of the stage `verify`.
        inputs: Artifacts that the stage was given.
    """
    verify, checkpoint = config.verify, inputs["checkpoint"]
    return {
        "model": config.model.name,
        "weights": config.model.weights,
        "trust_remote_code": config.model.trust_remote_code,
        "checkpoint": {
            "key": checkpoint.key,
            "commit": checkpoint.summary.get("commit") or hub_commit(checkpoint.folder),
            "adapter": checkpoint.summary.get("adapter"),
            **source_of(config.model.checkpoint, checkpoint.folder),
        },
        "commit": commit(),
        "packages": {name: version for name, version in versions(PACKAGES).items() if version != "absent"},
        "machine": machine(config.runtime.device, config.runtime.threads),
        "made_from": {name: artifact.key for name, artifact in inputs.items()},
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


def explain(
    plans: Mapping[Component, Plan],
    statistics: Mapping[Component, Mapping[str, ValueStatistics]],
    rows: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return the nodes that stay in FP32 with their reasons, and the calibration statistics of every value.

    Magnitudes that are infinite become None, because JSON has no infinity.

    Args:
        plans: Precision plan of each component.
        statistics: Calibration statistics of each component, by name of the value.
        rows: Description of each row of each calibration batch, for `ValueStatistics.seen_with`.
    """
    kept = []
    for component, plan in plans.items():
        for name, reason in plan.nodes.items():
            value = statistics[component].get(reason.value)
            if value is None:
                value = ValueStatistics(reason.largest or 0.0, reason.smallest or math.inf)
            kept.append(
                {
                    "component": component,
                    "node": name,
                    "rule": reason.rule,
                    "value": reason.value,
                    "largest": _finite(value.largest),
                    "smallest": _finite(value.smallest),
                    "overflow": value.overflow / max(1, value.elements),
                    "source": value.seen_with(rows) if reason.rule in DROPPABLE else "",
                }
            )
    magnitudes = {
        component: {name: [_finite(value.largest), _finite(value.smallest)] for name, value in values.items()}
        for component, values in statistics.items()
    }
    return {"kept": kept, "statistics": magnitudes}


def explain_weights(plan: WeightPlan) -> dict[str, Any]:
    """Return the format of each weight of products, with the errors and times of the candidates, as JSON."""
    return {"weight_formats": plan.dump()["weights"]}


def _finite(number: float) -> float | None:
    """Return the number; None if it is infinite or NaN."""
    return number if math.isfinite(number) else None
