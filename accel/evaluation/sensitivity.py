"""Trials of a plan: the graph with its values rounded, on inputs whose FP32 outputs are known."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel.adapters.types import Component
from accel.evaluation.calibration_data import Call
from accel.evaluation.compare import error, visible
from accel.graph import files
from accel.graph.precision import plan
from accel.graph.precision.emulate import round_values
from accel.graph.precision.formats import Format
from accel.graph.precision.observer import ValueStatistics, infer_types
from accel.runtime.providers import RUNTIME_ERRORS
from accel.runtime.session import HostSession, SessionSettings

STEPS = (0, 3, 15, 31)  # of those that follow a batch's first token, the ones that are compared
SLACK = 1.25  # a smaller plan may be this much further from FP32 than the rules' own, on each kind of input


@dataclass
class Result:
    """Kind of input -> how far the outputs of each call were from FP32, the furthest of each; and at how many of the
    tokens the likeliest was another.
    """

    errors: dict[str, list[float]] = field(default_factory=dict)
    changed: int = 0

    def error(self, kind: str) -> float:
        """Root of the mean square over the calls."""
        found = self.errors[kind]
        return math.sqrt(sum(value**2 for value in found) / len(found))

    @property
    def finite(self) -> bool:
        return all(math.isfinite(self.error(kind)) for kind in self.errors)

    def within(self, other: "Result") -> bool:
        """Whether this is as good as `other`, but for `SLACK`."""
        if self.changed > other.changed or not self.finite:
            return False
        return all(self.error(kind) <= SLACK * other.error(kind) for kind in self.errors)


class Recorder:
    """Runs FP32 graphs, and keeps what some of the calls of a role were given and what they gave, in files.

    `kinds`: what each batch is, by its number. `calls`: role -> kind and file of each call.
    """

    def __init__(self, folder: Path, kinds: Sequence[str]) -> None:
        self.folder, self.kinds = folder, kinds
        self.calls: dict[Component, list[tuple[str, Path]]] = {}

    def open(self, component: Component, path: Path, settings: SessionSettings) -> Call:
        session = HostSession(path, settings)
        kept = self.calls.setdefault(component, [])
        done: dict[int, int] = {}  # batch -> calls so far

        def call(number: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = session(inputs)
            place = done[number] = done.get(number, -1) + 1
            if component is not Component.DECODE or place in STEPS:
                path = self.folder / f"{component}-{number}-{place}.call"
                kept.append((self.kinds[number], path))
                tensors = {f"in.{name}": inputs[name] for name in session.inputs}
                tensors |= {f"out.{name}": tensor for name, tensor in found.items()}
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            return found

        return call


@dataclass(frozen=True)
class SensitivityTrial:
    """One role's graph, to be tried with other plans. `growing`: outputs that are the decoder's own caches."""

    component: Component
    graph: Path
    calls: Sequence[tuple[str, Path]]
    settings: SessionSettings
    format: Format
    overflow_margin: float
    statistics: Mapping[str, ValueStatistics]
    growing: Container[str]

    def __call__(self, chosen: plan.Plan, allowed: float = math.inf) -> Result:
        """Run every call with the values rounded as the plan says.

        Values that come within the margin of the format's limit overflow, so that a plan keeps the margin, too. It
        stops where outputs are not finite, or more than `allowed` tokens changed.
        """
        model = files.load(self.graph)
        infer_types(model)
        plan.clamp_masks(model, self.format)
        round_values(model, chosen, self.format, self._headroom())
        session = HostSession(files.dump(model), self.settings)
        del model
        result = Result()
        for kind, path in self.calls:
            tensors = load_file(path)
            given = {name.removeprefix("in."): value for name, value in tensors.items() if name.startswith("in.")}
            try:
                found = session(given)
            except RUNTIME_ERRORS:  # an index made of NaN
                return Result({kind: [math.inf]})
            expected = {name: tensors[f"out.{name}"] for name in session.outputs}
            errors = [self._error(name, found[name], expected[name], given) for name in session.outputs]
            result.errors.setdefault(kind, []).append(max(errors))
            if "logits" in found:
                likeliest, right = (logits["logits"][:, -1].argmax(-1) for logits in (found, expected))
                result.changed += int((likeliest != right).sum())
            if not result.finite or result.changed > allowed:
                return result
        return result

    def _error(self, name: str, found: Tensor, expected: Tensor, given: Mapping[str, Tensor]) -> float:
        apart = error(found, expected, visible(self.component, name, given, expected, self.growing))
        return apart if math.isfinite(apart) else math.inf  # NaN compares with nothing

    def _headroom(self) -> dict[str, float]:
        """Value -> a power of two that takes what lies within the margin beyond the limit."""
        scale = 2.0 ** torch.tensor(self.overflow_margin).log2().ceil().item()
        near = (
            name for name, held in self.statistics.items() if held.largest * self.overflow_margin > self.format.largest
        )
        return dict.fromkeys(near, scale)
