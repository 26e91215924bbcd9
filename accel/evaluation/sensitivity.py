"""Sensitivity trials of a precision plan: a graph with rounded values, on inputs whose FP32 outputs are recorded."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from accel.adapters.types import Component
from accel.evaluation.calibration_data import Call
from accel.evaluation.compare import error, output_mask
from accel.graph import files
from accel.graph.precision import plan
from accel.graph.precision.emulate import round_values
from accel.graph.precision.formats import Format
from accel.graph.precision.observer import ValueStatistics, infer_types
from accel.runtime.layout import IDS
from accel.runtime.providers import RUNTIME_ERRORS
from accel.runtime.session import HostSession, SessionSettings

RECORDED_DECODE_STEPS = (0, 3, 15, 31)  # decode steps of each batch whose outputs are compared
SLACK = 1.25  # a smaller plan may be this much further from FP32 than the rules' own, on each kind of input


@dataclass
class TrialResult:
    """Distance of a plan's outputs from FP32.

    Attributes:
        errors: Kind of input -> relative error of each call, that of its worst output.
        changed: Tokens at which another id became the likeliest.
    """

    errors: dict[str, list[float]] = field(default_factory=dict)
    changed: int = 0

    def error(self, kind: str) -> float:
        """Return the root mean square of the errors over the calls of one kind of input."""
        errors = self.errors[kind]
        return math.sqrt(sum(value**2 for value in errors) / len(errors))

    @property
    def finite(self) -> bool:
        """Return whether all errors are finite."""
        return all(math.isfinite(self.error(kind)) for kind in self.errors)

    def within(self, other: "TrialResult") -> bool:
        """Return whether this result is as good as `other`, up to a factor of `SLACK` on each kind of input."""
        if self.changed > other.changed or not self.finite:
            return False
        return all(self.error(kind) <= SLACK * other.error(kind) for kind in self.errors)


class RecordedCall(NamedTuple):
    """A call of a component.

    Attributes:
        kind: Kind of its batch.
        batch: Index of its batch.
        path: File with its inputs, `in.<name>`, and outputs, `out.<name>`.
        greedy: Its ids are those of greedy search.
    """

    kind: str
    batch: int
    path: Path
    greedy: bool = False

    def inputs(self) -> dict[str, Tensor]:
        """Read the inputs, by name."""
        return self._read("in.")

    def outputs(self) -> dict[str, Tensor]:
        """Read the outputs, by name."""
        return self._read("out.")

    def _read(self, prefix: str) -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, which is cut off."""
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


class Recorder:
    """Runs of FP32 graphs whose inputs and outputs are written to files, for some of the calls.

    Attributes:
        folder: Folder of the files.
        kinds: Kind of each batch, by its index.
        decode_steps: Decode steps of each batch that are recorded.
        greedy: The ids of the next calls are those of greedy search.
        calls: Component -> its recorded calls.
    """

    def __init__(
        self, folder: Path, kinds: Sequence[str], decode_steps: Container[int] = RECORDED_DECODE_STEPS
    ) -> None:
        self.folder, self.kinds, self.decode_steps = folder, kinds, decode_steps
        self.greedy = False
        self.calls: dict[Component, list[RecordedCall]] = {}

    def open(self, component: Component, path: Path, settings: SessionSettings) -> Call:
        """Open a component's graph and return a function that runs it and records some of its calls.

        All calls of encoder and prefill are recorded, and of decode those at `decode_steps` and of several tokens.
        """
        session = HostSession(path, settings)
        recorded = self.calls.setdefault(component, [])
        next_step: dict[int, int] = {}  # index of a batch -> number of its calls so far

        def call(index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = session(inputs)
            step = next_step.get(index, 0)
            next_step[index] = step + 1
            one_token = component is Component.DECODE and inputs[IDS].shape[1] == 1
            if not one_token or step in self.decode_steps:
                file = self.folder / f"{component}-{index}-{step}.call"
                recorded.append(RecordedCall(self.kinds[index], index, file, self.greedy))
                tensors = {f"in.{name}": inputs[name] for name in session.inputs}
                tensors |= {f"out.{name}": tensor for name, tensor in outputs.items()}
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
            return outputs

        return call


@dataclass(frozen=True)
class SensitivityTrial:
    """One component's FP32 graph, to be run with its values rounded as different plans ask for.

    Attributes:
        component: Component that the graph computes.
        graph: File of the FP32 graph.
        calls: Recorded calls.
        settings: Settings of the sessions.
        format: Format of 16 bits that values are rounded to.
        overflow_margin: Factor by which values must stay below the format's largest number.
        statistics: Value -> its calibration statistics.
        self_attention_caches: Names of the outputs that are caches of the decoder's own keys and values.
    """

    component: Component
    graph: Path
    calls: Sequence[RecordedCall]
    settings: SessionSettings
    format: Format
    overflow_margin: float
    statistics: Mapping[str, ValueStatistics]
    self_attention_caches: Container[str]

    def __call__(self, precision_plan: plan.Plan, allowed: float = math.inf) -> TrialResult:
        """Run the recorded calls with values rounded as the plan asks for, and compare the outputs with FP32.

        Values within the overflow margin of the format's limit are made to overflow, so that a plan that lowers them
        fails.

        Args:
            precision_plan: Plan to try.
            allowed: Changed tokens after which the trial stops early. It also stops at outputs that are not finite.
        """
        model = files.load(self.graph)
        infer_types(model)
        plan.clamp_masks(model, self.format)
        round_values(model, precision_plan, self.format, self._overflow_scales())
        session = HostSession(files.dump(model), self.settings)
        del model
        result = TrialResult()
        for call in self.calls:
            inputs = call.inputs()
            try:
                outputs = session(inputs)
            except RUNTIME_ERRORS:  # an index computed from NaN
                return TrialResult({call.kind: [math.inf]})
            expected = call.outputs()
            errors = [self._error(name, outputs[name], expected[name], inputs) for name in session.outputs]
            result.errors.setdefault(call.kind, []).append(max(errors))
            if "logits" in outputs:
                likeliest = outputs["logits"][:, -1].argmax(-1)  # [rows]
                expected_likeliest = expected["logits"][:, -1].argmax(-1)
                result.changed += int((likeliest != expected_likeliest).sum())
            if not result.finite or result.changed > allowed:
                return result
        return result

    def _error(self, name: str, found: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> float:
        """Return the relative error of one output; infinite for NaN, which `max` would lose."""
        mask = output_mask(self.component, name, inputs, expected, self.self_attention_caches)
        relative = error(found, expected, mask)
        return relative if math.isfinite(relative) else math.inf

    def _overflow_scales(self) -> dict[str, float]:
        """Return a power of two for every value within the overflow margin, to scale it beyond the format's limit."""
        scale = 2.0 ** torch.tensor(self.overflow_margin).log2().ceil().item()
        scales = {}
        for name, statistics in self.statistics.items():
            if statistics.largest * self.overflow_margin > self.format.largest:
                scales[name] = scale
        return scales
