"""Stages that rewrite graphs hold few weights in memory at a time, however many there are."""

import mmap
import weakref
from pathlib import Path

import pytest

from accel.adapters import registry
from accel.adapters.types import Component
from accel.graph import files
from accel.graph.precision.convert import convert_half
from accel.graph.precision.formats import FP16
from accel.graph.precision.plan import least_plan
from accel.pipeline.store import Artifact
from accel.stages import convert, merge, optimize
from accel.stages.audit import load_graph
from tests.conftest import Build

AT_ONCE = 3  # queries, keys and values, which become one weight


class Mappings:
    """Count of the files that are mapped into memory.

    Attributes:
        total: Mappings made so far.
        most: Largest number of mappings at the same time.
    """

    def __init__(self) -> None:
        self.total = self.most = 0
        self._made: list[weakref.ref[mmap.mmap]] = []

    def map(self, *arguments: object, **options: object) -> mmap.mmap:
        """Do what `mmap.mmap` does."""
        mapping = REAL(*arguments, **options)  # type: ignore[arg-type]
        self._made = [*(made for made in self._made if made() is not None), weakref.ref(mapping)]
        self.total += 1
        self.most = max(self.most, len(self._made))
        return mapping


REAL = mmap.mmap


def test_weights_are_mapped_one_after_the_other(
    build: Build, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are transposed, packed, compared with another graph's, and converted to FP16."""
    monkeypatch.setattr(files, "EXTERNAL_ABOVE", 0)
    config, artifacts = build(tiny, "[export]")
    architecture = registry.build(config.architecture)
    inputs = {"checkpoint": artifacts["checkpoint"]}
    mappings = Mappings()
    monkeypatch.setattr(mmap, "mmap", mappings.map)
    exported = tmp_path / "export"
    exported.mkdir()
    for path in artifacts["export"].folder.glob("*.onnx"):
        files.save(files.load(path), exported / path.name)
    inputs["export"] = Artifact(exported, artifacts["export"].manifest)
    for stage in (optimize, convert, merge):
        folder = tmp_path / stage.STAGE.name
        folder.mkdir()
        mappings.most = 0
        stage.STAGE.run(config, inputs, architecture, folder)
        assert mappings.most <= AT_ONCE, stage.STAGE.name
        inputs[stage.STAGE.name] = Artifact(folder, artifacts["export"].manifest)
    assert mappings.total > 20
    mappings.most = 0
    model = load_graph(inputs["optimize"].folder, Component.DECODE, FP16)
    convert_half(model, least_plan(model, FP16), FP16)
    files.save(model, tmp_path / "half.onnx")
    assert mappings.most == 1
