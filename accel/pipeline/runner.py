"""Pipeline that runs stages in order and skips those whose artifacts exist.

Every key is computed from the configuration and the checkpoint before anything runs, so a stage whose artifact exists
needs none of the artifacts before it: they may have been deleted.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accel import progress
from accel.adapters.types import Architecture
from accel.config.schema import EXPORT_TRITON, SERVE, STAGES, Config
from accel.errors import AccelError, StageError, summarize, unknown
from accel.pipeline.external import pretrained_artifact
from accel.pipeline.source import adapter_source, stage_source
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact, Store, content_hash
from accel.system.environment import machine
from accel.system.hashing import make_key, versions
from accel.system.host_memory import frozen_objects

# A run reports as its result the folder of the first of these stages that was requested.
RESULTS = ("verify", "merge")
# Stages that `stage=all` leaves out, because they need a graph that is not made by default.
EXPLICIT = ("plan",)
# Stages that run only because others need their artifacts; `stage=...` doesn't accept them.
HIDDEN = ("checkpoint", "prompts", "answers", "reference", "torch_error", "text_logits", "calibrate")


def select_stages(stage: Any, mixed: bool = True) -> list[str]:
    """Return the stages that `stage=...` requests, in the order in which they run.

    Args:
        stage: A stage's name, "all", one of "serve" and "export_triton", which need `verify`, or a list of them.
        mixed: Precision is mixed. If False, "all" leaves out the audit, whose plan nothing would use.

    Raises:
        AccelError: If a name is unknown, the list is empty, or it has both "serve" and "export_triton".
    """
    names = stage if isinstance(stage, list | tuple) else [stage]
    choices = (*STAGES, SERVE, EXPORT_TRITON, "all")
    if not names:
        raise AccelError(f"stage=[] names no stage. Choices: {', '.join(choices)}")
    for name in names:
        if name not in choices:
            raise unknown("stage", name, choices)
    selected = set(names)
    if {SERVE, EXPORT_TRITON} <= selected:
        raise AccelError(f"stage={list(names)}: {SERVE} doesn't end by itself: run {EXPORT_TRITON} before, by itself")
    if {SERVE, EXPORT_TRITON} & selected:
        selected.add("verify")
    if "all" in names:
        selected |= {name for name in STAGES if name not in EXPLICIT and (mixed or name != "audit")}
    return [name for name in STAGES if name in selected]


def includes(stage: Any, *names: str) -> bool:
    """Return whether `stage=...` asks for one of `names` by its name."""
    return any(name in names for name in (stage if isinstance(stage, list | tuple) else [stage]))


def load_stage(name: str) -> Stage:
    """Import `accel/stages/<name>.py` and return the stage that it defines."""
    stage: Stage = importlib.import_module(f"accel.stages.{name}").STAGE
    return stage


def restrict_config(config: Config, sections: Sequence[str]) -> Config:
    """Return `config` with every section but `sections` at its default, so that a stage can't depend on the others.

    Args:
        config: Full configuration.
        sections: Names of sections, or `section.key` for one value of a section.
    """
    restricted = Config()
    for name in sections:
        section, _, key = name.partition(".")
        value = getattr(config, section)
        if key:
            value = replace(getattr(restricted, section), **{key: getattr(value, key)})
        restricted = replace(restricted, **{section: value})
    return restricted


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Turn any other error than accel's own within the context into a `StageError` that names the stage."""
    try:
        yield
    except AccelError:
        raise
    except Exception as error:  # of any library
        raise StageError(f"stage {name} failed: {summarize(error)}\nhydra.verbose=true shows where") from error


class Pipeline:
    """Stages of one configuration, over one store.

    Attributes:
        config: Configuration.
        architecture: Adapter of the model.
        store: Store of the artifacts.
        built: Names of the stages that were run, as opposed to reused.
    """

    def __init__(self, config: Config, architecture: Architecture) -> None:
        self.config = config
        self.architecture = architecture
        self.store = Store(Path(config.artifacts), config.model.name)
        self.built: list[str] = []
        self._keys: dict[str, str] = {}
        self._artifacts: dict[str, Artifact] = {}

    def stage(self, name: str) -> Stage:
        """Return the stage `name`."""
        return load_stage(name)

    def key(self, name: str) -> str:
        """Return the SHA-256 of everything that the artifact of stage `name` depends on, as hex."""
        if name not in self._keys:
            if self._is_external(name):
                self._keys[name] = self._checkpoint().key
            else:
                self._keys[name] = make_key(**self._key_parts(name))
        return self._keys[name]

    def _key_parts(self, name: str) -> dict[str, Any]:
        """Return everything that the artifact of stage `name` depends on, as JSON values."""
        stage = self.stage(name)
        parts: dict[str, Any] = {
            "stage": name,
            "source": stage_source(name),
            "config": self._section_values(stage),
            "architecture": self.config.architecture,
            "adapter": adapter_source(self.config.architecture, self.architecture),
            "upstream": {upstream: self.key(upstream) for upstream in stage.inputs(self.config)},
            "files": [content_hash(Path(path)) for path in stage.files(self.config)],
            "packages": versions(stage.packages),
        }
        if stage.machine:
            parts["machine"] = machine(self.config.runtime.device, self.config.runtime.threads)
        return parts

    def _section_values(self, stage: Stage) -> dict[str, Any]:
        """Return the values of the sections that a stage declares, without those that only locate the checkpoint.

        The checkpoint's content, and that of an adapter in it, is in the key already, through its artifact's key.
        """
        values = asdict(self.config)
        for key in ("name", "checkpoint", "revision", "peft_adapter"):
            del values["model"][key]
        sections = {}
        for name in stage.sections:
            value: Any = values
            for part in name.split("."):
                value = value[part]
            sections[name] = value
        return sections

    def _is_external(self, name: str) -> bool:
        """Return whether the artifact of stage `name` is a pretrained checkpoint as it is, outside the store."""
        model = self.config.model
        return name == "checkpoint" and model.weights == "pretrained" and model.peft_adapter is None

    def _checkpoint(self) -> Artifact:
        """Return the pretrained checkpoint; its files are hashed at the first call."""
        if "checkpoint" not in self._artifacts:
            self._artifacts["checkpoint"] = pretrained_artifact(self.config.model)
        return self._artifacts["checkpoint"]

    def find(self, name: str) -> Artifact | None:
        """Return the artifact of stage `name` if it is finished and undamaged, else None."""
        if name not in self._artifacts:
            artifact = self._checkpoint() if self._is_external(name) else self.store.find(name, self.key(name))
            if artifact is None:
                return None
            self._artifacts[name] = artifact
        return self._artifacts[name]

    def artifact(self, name: str) -> Artifact:
        """Return the artifact of stage `name`: the existing one, or a new one after running the stages it needs."""
        existing = self.find(name)
        if existing is not None:
            return existing
        stage = self.stage(name)
        inputs = {upstream: self.artifact(upstream) for upstream in stage.inputs(self.config)}
        config = restrict_config(self.config, stage.sections)

        def make(folder: Path) -> Mapping[str, Any]:
            self.built.append(name)
            with progress.stage(name), naming_stage(name):
                return stage.run(config, inputs, self.architecture, folder)

        artifact = self.store.build(
            name,
            self.key(name),
            make,
            upstream={upstream: inputs[upstream].key for upstream in inputs},
            config=self._section_values(stage),
            packages=versions(stage.packages),
        )
        self._artifacts[name] = artifact
        if name not in self.built:
            progress.note(f"{name:<10} reused, made by another run meanwhile  {artifact.folder}")
            return artifact
        manifest = artifact.manifest
        progress.note(
            f"{name:<10} made in {manifest.seconds:6.1f} s, peak memory {manifest.peak_memory / 1e6:6.0f} MB "
            f"(+{manifest.added_memory / 1e6:.0f})  {artifact.folder}"
        )
        return artifact

    def needed(self, names: Sequence[str]) -> list[str]:
        """Return those of the requested stages `names` whose artifacts must exist and be undamaged, in order.

        These are the run's result, the stages that no other requested stage depends on, and the inputs of a needed
        stage that has to run.
        """
        needed: list[str] = []
        result = next((name for name in RESULTS if name in names), None)
        for name in reversed(names):
            dependents = [other for other in names if name in self._upstream(other)]
            users = [other for other in needed if name in self.stage(other).inputs(self.config)]
            if not dependents or name == result or any(self.find(user) is None for user in users):
                needed.append(name)
        return needed[::-1]

    def pending(self, names: Sequence[str]) -> set[str]:
        """Return the stages that `run` will run for the requested stages `names`, those they depend on included."""
        pending: set[str] = set()
        unvisited = self.needed(names)
        while unvisited:
            name = unvisited.pop()
            if name not in pending and self.find(name) is None:
                pending.add(name)
                unvisited += self.stage(name).inputs(self.config)
        return pending

    def _upstream(self, name: str) -> set[str]:
        """Return all stages that stage `name` depends on, directly or not."""
        stages: set[str] = set()
        for upstream in self.stage(name).inputs(self.config):
            stages.add(upstream)
            stages |= self._upstream(upstream)
        return stages

    def run(self, names: Sequence[str]) -> dict[str, Artifact]:
        """Run the stages `names` in order, reusing artifacts that exist.

        Returns:
            Stage -> artifact, for those of `names` and of the hidden stages that were used.
        """
        self.store.clear_leftovers()
        needed = self.needed(names)  # imports the stages
        with frozen_objects():
            self._run(names, needed)
        return {name: self._artifacts[name] for name in (*HIDDEN, *names) if name in self._artifacts}

    def _run(self, names: Sequence[str], needed: Sequence[str]) -> None:
        """Reuse or make the artifacts of the stages `names`, of which those in `needed` must exist."""
        for name in names:
            # An artifact that isn't needed is only listed in the report, so its files are not hashed again.
            existing = self.find(name) if name in needed else self.store.peek(name, self.key(name))
            if existing is not None:
                self._artifacts[name] = existing
                progress.note(f"{name:<10} reused  {existing.folder}")
            elif name in needed:
                self.artifact(name)
            if name in self._artifacts:
                self.stage(name).deliver(self.config, self._artifacts[name].folder)
