"""Mixed precision: the graphs with the plan carried out; and what would hide values from the audit: attention fused."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel import console
from accel.adapter import Architecture
from accel.artifacts import Artifact
from accel.graph import files
from accel.graph.convert import convert_half, half_share
from accel.graph.formats import FORMATS
from accel.graph.fuse_attention import fuse_attention
from accel.schema import Config
from accel.stages import Stage, audit


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `<role>.onnx` for every role; in 16 bits, reports what the mix is made of."""
    source = inputs["optimize"].folder
    half = config.precision.dtype != "float32"
    if not half and not config.convert.fuse_attention:
        for path in source.glob("*.onnx*"):
            shutil.copyfile(path, out / path.name)
        return {}
    plans = audit.read_plans(inputs["audit"].folder) if half else {}
    shares = {}
    for role in console.track(architecture.roles(), "converting"):
        model = files.load(source / f"{role}.onnx")
        if half:
            convert_half(model, plans[role], FORMATS[config.precision.dtype])
            shares[str(role)] = half_share(model)
        if config.convert.fuse_attention:
            fuse_attention([model])
            console.note(f"{role}: {files.node_count(model)} nodes with attention fused")
        files.save(model, out / f"{role}.onnx")
    return shares


STAGE = Stage(
    name="convert",
    run=run,
    inputs=lambda config: ("optimize",) if config.precision.dtype == "float32" else ("optimize", "audit"),
    sections=("precision.dtype", "convert"),
    packages=("onnx", "onnx-ir"),
)
