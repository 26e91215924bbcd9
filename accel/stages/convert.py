"""Mixed precision: the graphs with the plan carried out, or passed through for FP32."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel import console
from accel.adapter import Architecture
from accel.artifacts import Artifact
from accel.graph import files
from accel.graph.convert import convert_half, half_share
from accel.schema import Config
from accel.stages import Stage, audit, takes


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `<role>.onnx` for every role; reports each one's share of FP16 nodes and weight bytes, and its casts."""
    source = inputs["optimize"].folder
    if config.precision.dtype == "float32":
        for path in source.glob("*.onnx*"):
            shutil.copyfile(path, out / path.name)
        return {}
    plans = audit.read_plans(inputs["audit"].folder)
    shares = {}
    for role in console.track(architecture.roles(), "converting"):
        model = files.load(source / f"{role}.onnx")
        convert_half(model, plans[role])
        shares[str(role)] = half_share(model)
        files.save(model, out / f"{role}.onnx")
    return shares


STAGE = Stage(
    name="convert",
    run=run,
    inputs=takes("optimize", "audit"),
    sections=("precision",),
    packages=("onnx", "onnx-ir"),
)
