"""Audit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel.adapter import Architecture
from accel.artifacts import Artifact
from accel.schema import Config
from accel.stages import Stage, takes


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    return {}


STAGE = Stage(name="audit", run=run, inputs=takes("optimize"), sections=("audit",))
