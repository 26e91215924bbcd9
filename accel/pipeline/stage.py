"""One module per stage, each ending in its `STAGE`: what it takes, what its key depends on, and what runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.adapters.types import Architecture
from accel.config.schema import Config
from accel.pipeline.store import Artifact

Run = Callable[[Config, Mapping[str, Artifact], Architecture, Path], Mapping[str, Any]]
"""(config, artifacts taken, adapter, folder to write into) -> summary for the manifest, as JSON."""


@dataclass(frozen=True)
class Stage:
    """A pure function of `sections` of the config, the artifacts named by `inputs`, the adapter and `files`.

    A section may be given as `section.key`, where one value of it is all that counts.
    The pipeline hands `run` a config in which every other section holds its default, so that nothing a stage
    depends on can be missing from its key.
    """

    name: str
    run: Run
    inputs: Callable[[Config], tuple[str, ...]]
    sections: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    machine: bool = False  # the result depends on device, driver and threads
    files: Callable[[Config], tuple[str, ...]] = lambda config: ()
    deliver: Callable[[Config, Path], None] = lambda config, folder: None  # whenever it was asked for, made or reused


def takes(*names: str) -> Callable[[Config], tuple[str, ...]]:
    """The inputs of a stage whatever the config says."""
    return lambda config: names
