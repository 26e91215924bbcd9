"""Definition of a stage: its inputs, the values that its key depends on, and the function that runs.

Every module of `accel.stages` ends in its `STAGE`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.pipeline.store import Artifact

Run = Callable[[Config, Mapping[str, Artifact], Architecture, Path], Mapping[str, Any]]
"""(config, input artifacts by stage, adapter, folder to write into) -> summary for the manifest, as JSON values."""


SESSION = tuple(
    f"runtime.{name}"
    for name in (
        "name", "provider", "provider_options", "session", "environment", "device", "threads", "compute_dtype"
    )
)  # fmt: skip
"""Sections of a stage that opens sessions but generates nothing: neither caches nor the engine change what it makes."""


@dataclass(frozen=True)
class Stage:
    """Pure function of sections of the config, input artifacts, the adapter and files.

    The pipeline gives `run` a config in which every other section has its default, so that a stage can't depend on a
    value that is missing from its key.

    Attributes:
        name: Name of the stage and of its module.
        run: Function that writes the artifact.
        inputs: Config -> names of the stages whose artifacts it takes.
        sections: Sections of the config that it depends on; `section.key` for one value of a section.
        packages: Packages whose versions the artifact depends on.
        machine: The artifact depends on device, driver and number of threads.
        files: Config -> paths of other files that it reads.
        deliver: Called with the config and the artifact's folder whenever the stage was requested, run or reused.
    """

    name: str
    run: Run
    inputs: Callable[[Config], tuple[str, ...]]
    sections: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    machine: bool = False
    files: Callable[[Config], tuple[str, ...]] = lambda config: ()
    deliver: Callable[[Config, Path], None] = lambda config, folder: None


def takes(*names: str) -> Callable[[Config], tuple[str, ...]]:
    """Return a value for `Stage.inputs` that is `names` for every config."""
    return lambda config: names
