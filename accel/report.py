"""What the command line shows when the stages are done."""

from collections.abc import Mapping
from typing import Any

from accel import console
from accel.artifacts import Artifact
from accel.loading import verdict_of
from accel.pipeline import Pipeline
from accel.schema import Config


def finish(config: Config, pipeline: Pipeline, artifacts: Mapping[str, Artifact]) -> None:
    if "verify" in artifacts:
        verdict: Any = verdict_of(artifacts["verify"].folder)
        console.out.print(verdict["identical"], verdict["error_rates"], verdict["samples"][:3])
    console.out.print({name: str(a.folder) for name, a in artifacts.items()})


def sweep_row(settings: Any, artifacts: Any, error: str | None) -> None:
    pass
