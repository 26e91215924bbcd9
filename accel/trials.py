"""Trials of a plan: the graph with its values rounded, on inputs whose FP32 outputs are known."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accel.adapter import Role
from accel.batches import Call
from accel.compare import Difference, difference, visible
from accel.graph import files, plan
from accel.graph.emulate import round_values
from accel.graph.formats import Format
from accel.graph.probe import Range, infer_types
from accel.runtime.providers import RUNTIME_ERRORS
from accel.runtime.session import SessionSettings, open_session

STEPS = (0, 3, 15, 31)  # of those that follow a batch's first token, the ones that are compared
SLACK = 1.5  # a smaller plan may be this much further from FP32 than the one that the rules make, and no more


@dataclass
class Result:
    """How far outputs were from FP32, and at how many of the tokens the likeliest was another."""

    difference: Difference = field(default_factory=Difference)
    changed: int = 0
    tokens: int = 0

    def within(self, other: "Result") -> bool:
        """Whether this is as good as `other`, but for `SLACK`."""
        return self.difference.relative <= SLACK * other.difference.relative and self.changed <= other.changed


class Recorder:
    """Runs FP32 graphs, and keeps what some of the calls of a role were given and what they gave, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: dict[Role, list[Path]] = {}

    def open(self, role: Role, path: Path, settings: SessionSettings) -> Call:
        session = open_session(path, settings)
        wanted = [port.name for port in session.get_inputs()]
        outputs = [port.name for port in session.get_outputs()]
        kept = self.calls.setdefault(role, [])
        done: dict[int, int] = {}  # batch -> calls so far

        def call(number: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = {name: feeds[name] for name in wanted}
            values = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
            found = {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}
            place = done[number] = done.get(number, -1) + 1
            if role is not Role.STEP or place in STEPS:
                kept.append(self.folder / f"{role}-{number}-{place}.call")
                tensors = {f"in.{name}": tensor for name, tensor in given.items()}
                tensors |= {f"out.{name}": tensor for name, tensor in found.items()}
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, kept[-1])
            return found

        return call


@dataclass(frozen=True)
class Trial:
    """One role's graph, to be tried with other plans. `growing`: outputs that are the decoder's own caches."""

    role: Role
    graph: Path
    calls: Sequence[Path]
    settings: SessionSettings
    format: Format
    margin: float
    ranges: Mapping[str, Range]
    growing: Container[str]

    def __call__(self, chosen: plan.Plan, bound: Callable[[Result], bool] = lambda result: True) -> Result:
        """Run every call with the values rounded as the plan says; stops at the first result that `bound` refuses.

        Values that come within the margin of the format's limit overflow, so that a plan keeps the margin, too.
        """
        model = files.load(self.graph)
        infer_types(model)
        plan.clamp_masks(model, self.format)
        round_values(model, chosen, self.format, self._headroom())
        session = open_session(files.dump(model), self.settings)
        del model
        outputs = [port.name for port in session.get_outputs()]
        result = Result()
        for path in self.calls:
            tensors = load_file(path)
            given = {name.removeprefix("in."): value for name, value in tensors.items() if name.startswith("in.")}
            try:
                values = session.run(None, {name: value.numpy() for name, value in given.items()})
            except RUNTIME_ERRORS:  # an index made of NaN
                result.difference.widen(Difference(float("nan"), float("nan")))
                return result
            for name, value in zip(outputs, values, strict=True):
                self._take(result, name, torch.from_numpy(value), tensors[f"out.{name}"], given)
            if not bound(result):
                return result
        return result

    def _take(self, result: Result, name: str, found: Tensor, expected: Tensor, given: Mapping[str, Tensor]) -> None:
        result.difference.widen(difference(found, expected, visible(self.role, name, given, expected, self.growing)))
        if name == "logits":
            result.changed += int((found[:, -1].argmax(-1) != expected[:, -1].argmax(-1)).sum())
            result.tokens += len(expected)

    def _headroom(self) -> dict[str, float]:
        """Value -> a power of two that takes what lies within the margin beyond the limit."""
        scale = 2.0 ** torch.tensor(self.margin).log2().ceil().item()
        near = (name for name, held in self.ranges.items() if held.largest * self.margin > self.format.largest)
        return dict.fromkeys(near, scale)
