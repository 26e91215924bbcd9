"""Mixed precision."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.adapter import Architecture
from accel.artifacts import Artifact
from accel.schema import Config
from accel.stages import Stage, takes


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    for path in inputs["optimize"].folder.glob("*.onnx*"):
        shutil.copyfile(path, out / path.name)
    return {}


STAGE = Stage(name="convert", run=run, inputs=takes("optimize"), sections=("precision",))
