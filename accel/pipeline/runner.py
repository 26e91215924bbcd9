"""Runs stages in order, and skips what exists.

Every key is computed from the configuration and the checkpoint before anything runs, so a stage whose artifact exists
needs none of those before it: they may have been deleted.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import STAGES, Config
from accel.errors import AccelError, unknown
from accel.pipeline.external import pretrained
from accel.pipeline.source import adapter_source, stage_source
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact, Store, content_hash
from accel.system.environment import machine
from accel.system.hashing import make_key, versions

# Whose folder a run names as its result: the first of these that was asked for.
RESULTS = ("verify", "merge")
# Stages that others need and nobody asks for by name.
HIDDEN = ("checkpoint", "prompts", "reference", "torch_error", "calibrate")


def chosen(stage: Any, mixed: bool = True) -> list[str]:
    """The stages that `stage=...` asks for, in the order in which they run. Raises `AccelError` on an unknown one.

    Without `mixed` precision `all` leaves out the audit, which nothing would use.
    """
    names = stage if isinstance(stage, list | tuple) else [stage]
    if not names:
        raise AccelError(f"stage=[] names no stage. Choices: {', '.join((*STAGES, 'all'))}")
    for name in names:
        if name not in (*STAGES, "all"):
            raise unknown("stage", name, (*STAGES, "all"))
    everything = [name for name in STAGES if mixed or name != "audit"] if "all" in names else []
    return [name for name in STAGES if name in names or name in everything]


def load_stage(name: str) -> Stage:
    """The stage defined in `accel/stages/<name>.py`."""
    stage: Stage = importlib.import_module(f"accel.stages.{name}").STAGE
    return stage


def only(config: Config, sections: Sequence[str]) -> Config:
    """`config` with every section but `sections` at its default, so that a stage can't depend on the others.

    `section.key` names one value of a section.
    """
    kept = Config()
    for name in sections:
        section, _, key = name.partition(".")
        given = getattr(config, section)
        value = replace(getattr(kept, section), **{key: getattr(given, key)}) if key else given
        kept = replace(kept, **{section: value})
    return kept


class Pipeline:
    """The stages of one configuration, over one store."""

    def __init__(self, config: Config, architecture: Architecture) -> None:
        self.config = config
        self.architecture = architecture
        self.store = Store(Path(config.artifacts), config.model.name)
        self.built: list[str] = []
        self._keys: dict[str, str] = {}
        self._artifacts: dict[str, Artifact] = {}

    def stage(self, name: str) -> Stage:
        return load_stage(name)

    def key(self, name: str) -> str:
        """SHA-256 of all that the artifact of stage `name` is made from."""
        if name not in self._keys:
            self._keys[name] = self._checkpoint().key if self._external(name) else make_key(**self._parts(name))
        return self._keys[name]

    def _parts(self, name: str) -> dict[str, Any]:
        stage = self.stage(name)
        parts: dict[str, Any] = {
            "stage": name,
            "source": stage_source(name),
            "config": self._sections(stage),
            "architecture": self.config.architecture,
            "adapter": adapter_source(self.config.architecture, self.architecture),
            "upstream": {upstream: self.key(upstream) for upstream in stage.inputs(self.config)},
            "files": [content_hash(Path(path)) for path in stage.files(self.config)],
            "packages": versions(stage.packages),
        }
        return parts | (
            {"machine": machine(self.config.runtime.device, self.config.runtime.threads)} if stage.machine else {}
        )

    def _sections(self, stage: Stage) -> dict[str, Any]:
        """The sections a stage declares. Where the checkpoint lies is left out: its content is what counts."""
        values = asdict(self.config)
        for place in ("name", "checkpoint", "revision"):
            del values["model"][place]
        return {name: reduce(getitem, name.split("."), values) for name in stage.sections}

    def _external(self, name: str) -> bool:
        """A pretrained checkpoint stays where it lies, outside the store."""
        return name == "checkpoint" and self.config.model.weights == "pretrained"

    def _checkpoint(self) -> Artifact:
        if "checkpoint" not in self._artifacts:
            self._artifacts["checkpoint"] = pretrained(self.config.model)
        return self._artifacts["checkpoint"]

    def find(self, name: str) -> Artifact | None:
        """The finished artifact of stage `name`, if it is there and undamaged."""
        if name not in self._artifacts:
            found = self._checkpoint() if self._external(name) else self.store.find(name, self.key(name))
            if found is None:
                return None
            self._artifacts[name] = found
        return self._artifacts[name]

    def artifact(self, name: str) -> Artifact:
        """The artifact of stage `name`: reused, or made from those before it."""
        if (found := self.find(name)) is not None:
            return found
        stage = self.stage(name)
        inputs = {upstream: self.artifact(upstream) for upstream in stage.inputs(self.config)}
        config = only(self.config, stage.sections)

        def make(folder: Path) -> Mapping[str, Any]:
            with progress.stage(name):
                return stage.run(config, inputs, self.architecture, folder)

        made = self.store.build(
            name,
            self.key(name),
            make,
            upstream={upstream: artifact.key for upstream, artifact in inputs.items()},
            config=self._sections(stage),
            packages=versions(stage.packages),
        )
        self._artifacts[name] = made
        self.built.append(name)
        manifest = made.manifest
        progress.note(
            f"{name:<10} made in {manifest.seconds:6.1f} s, peak memory {manifest.peak_memory / 1e6:6.0f} MB "
            f"(+{manifest.added_memory / 1e6:.0f})  {made.folder}"
        )
        return made

    def needed(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that must be at hand and undamaged.

        Nothing else asked for is made from them, or what is isn't there, or they are the result that the run names.
        """
        needed: list[str] = []
        result = next((name for name in RESULTS if name in names), None)
        for name in reversed(names):
            above = [other for other in names if name in self._below(other)]
            users = [other for other in needed if name in self.stage(other).inputs(self.config)]
            if not above or name == result or any(self.find(user) is None for user in users):
                needed.append(name)
        return needed[::-1]

    def _below(self, name: str) -> set[str]:
        inputs = self.stage(name).inputs(self.config)
        return set(inputs).union(*(self._below(upstream) for upstream in inputs)) if inputs else set()

    def run(self, names: Sequence[str]) -> dict[str, Artifact]:
        """Run `names` in order. Returns the artifacts that are at hand afterwards."""
        needed = self.needed(names)
        for name in names:
            # What nothing asked for is made from is only looked up for the report, so its files are not read again.
            found = self.find(name) if name in needed else self.store.peek(name, self.key(name))
            if found is not None:
                self._artifacts[name] = found
                progress.note(f"{name:<10} reused  {found.folder}")
            elif name in needed:
                self.artifact(name)
            if name in self._artifacts:
                self.stage(name).deliver(self.config, self._artifacts[name].folder)
        return {name: self._artifacts[name] for name in (*HIDDEN, *names) if name in self._artifacts}
