"""Holds a candidate's outputs against float64, component by component and token by token along a generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.adapters.types import Architecture, Component
from accel.evaluation import reference_data
from accel.evaluation.compare import Difference, token_errors, visible
from accel.evaluation.component_runner import ComponentRunner, Run, signatures
from accel.evaluation.rounding import FACTOR, SAMPLES, allowed_errors
from accel.models.generation import AcceleratedModel
from accel.runtime.decoder_inputs import decoder_inputs
from accel.runtime.streams import on_shared_stream

# On a GPU: the first call in a shape is an ordinary one, the second is captured as a CUDA graph, the third replays it.
PASSES = 3


@dataclass
class Drift:
    """Absolute error of the logits by token of a path: over the vocabulary and all paths that are this long.

    `torch_worst`: PyTorch's own largest error at that token, in the same precision; None where it isn't finite; empty
    where it isn't known.
    """

    mean: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    torch_worst: list[float | None] = field(default_factory=list)
    scale: float = 0.0  # largest logit


@dataclass
class VerificationResult:
    """What `verify` found. Written into the deployable as `verdict.json`."""

    passed: bool = False
    precision: str = "float32"
    execution: str = "native"
    runtime: str = "cpu"
    threshold: float = 0.0
    factor: float = FACTOR
    reference: str = f"PyTorch in float64, module by module; its own error by {SAMPLES} evaluations"
    outputs: dict[str, Difference] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    inputs: int = 0
    identical: dict[str, float] = field(default_factory=dict)
    first_difference: dict[str, int] = field(default_factory=dict)
    differing: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    references: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def compare_outputs(
    model: AcceleratedModel,
    architecture: Architecture,
    expected: Path,
    own: Mapping[str, Tensor],
    verification: VerificationResult,
) -> bool:
    """Run every component at the reference's inputs through the runtime: both branches, every output.

    `expected`: the reference's folder. `own`: what PyTorch itself is off by: see `torch_error`. Returns whether outputs
    have the right shapes and are finite, so that it makes sense to generate.
    """
    sound = True
    growing = {spec.name for spec in architecture.signature(model.config, Component.DECODE).outputs}
    numbered = enumerate(reference_data.read_calls(expected))
    for _, group in groupby(numbered, key=lambda one: one[1].what):
        sequence = list(group)
        with on_shared_stream(model.device):  # as `generate` does, and as capturing needs
            for _ in range(PASSES if model.device.type == "cuda" else 1):
                found = _run_sequence(model, architecture, [call for _, call in sequence])
        for (number, call), outputs in zip(sequence, found, strict=True):
            for name, value in call.expected.items():
                shown = visible(call.component, name, call.given, value, growing)
                known = own.get(f"{number}.{name}")
                sound = (
                    measure(verification, f"{call.component}.{name}", call.what, outputs[name], value, known, shown)
                    and sound
                )
    return sound


def _run_sequence(
    model: AcceleratedModel, architecture: Architecture, calls: Sequence[reference_data.Call]
) -> list[dict[str, Tensor]]:
    """Run calls that follow from one another through the runtime. Returns the outputs of each, in host memory.

    What the decoder takes of the encoder is the reference's, so that errors are told apart.
    """
    runner = ComponentRunner(signatures(architecture, model.config), _runtime_run(model, architecture))
    made = []
    for call in calls:
        found = runner(call.component, call.given)
        made.append({name: found[name].cpu() for name in call.expected})
        if call.component is Component.ENCODER:
            runner.pool |= call.expected
    return made


def _runtime_run(model: AcceleratedModel, architecture: Architecture) -> Run:
    """Runs components through the runtime, which keeps the decoder's caches by itself."""
    cache = architecture.signature(model.config, Component.DECODE).cache
    state: Any = None

    def run(component: Component, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        nonlocal state
        if component is Component.ENCODER:
            return model.runtime.encode(inputs)
        if component is Component.PREFILL:
            logits, state = model.runtime.prefill(inputs)
        else:
            logits = model.runtime.decode(inputs, state)
        views = state.views()
        return {"logits": logits} | {output: views[name] for name, output in cache.items()}

    return run


def compare_paths(
    model: AcceleratedModel,
    architecture: Architecture,
    expected: Path,
    own: Mapping[str, Tensor],
    verification: VerificationResult,
    rerouted: float = 0.0,
) -> bool:
    """Walk along what PyTorch generated, token by token over growing caches, and compare the logits at every token.

    `rerouted`: the share of a path's tokens, the furthest off, that are left out: see `REROUTED`.

    Nothing waits for a result in between, so that on a GPU what would overtake something else does. Whether all are
    finite.
    """
    sound = True
    apart: list[Tensor] = []
    known_errors: list[Tensor] = []
    for number, path in enumerate(reference_data.read_paths(expected)):
        hidden = _encoded(architecture, model, path.given)
        ids = path.ids.to(model.device)  # [1, tokens]
        seen = torch.ones_like(ids)
        inputs = [decoder_inputs(ids[:, [i]], seen[:, : i + 1]) for i in range(ids.shape[1])]
        with on_shared_stream(model.device):  # as `generate` does
            logits, state = model.runtime.prefill({**inputs[0], **hidden})
            found = torch.cat([logits, *(model.runtime.decode(one, state) for one in inputs[1:])], dim=1)
        apart.append((found.cpu().double() - path.logits).abs()[0])  # [tokens, vocabulary]
        order = apart[-1].amax(-1).argsort(descending=True)
        counted = torch.ones(1, len(order), dtype=torch.int64)
        counted[:, order[: int(rerouted * len(order))]] = 0
        known = own.get(f"path-{number}.logits")
        known_errors += [] if known is None else [known[0]]
        what = f"a generation, input {number}"
        sound = measure(verification, "path.logits", what, found, path.logits, known, counted) and sound
        verification.drift.scale = max(verification.drift.scale, float(path.logits.abs().max()))
    for position in range(max(map(len, apart))):
        here = torch.cat([one[position] for one in apart if position < len(one)]).sort().values
        verification.drift.mean.append(float(here.mean()))
        verification.drift.p99.append(float(here[int(0.99 * (len(here) - 1))]))
        verification.drift.worst.append(float(here[-1]))
        theirs = [float(one[position]) for one in known_errors if position < len(one)]
        verification.drift.torch_worst += [max(theirs) if all(map(isfinite, theirs)) else None] if theirs else []
    return sound


def _encoded(architecture: Architecture, model: AcceleratedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's inputs that come from the encoder, for inputs `given`; none without an encoder."""
    if Component.ENCODER not in architecture.components():
        return {}
    return _context(architecture, model, {**given, **model.runtime.encode(given)})


def _context(architecture: Architecture, model: AcceleratedModel, pool: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's inputs that come from the encoder's inputs and outputs, which are in `pool`."""
    specs = architecture.signature(model.config, Component.PREFILL).inputs
    return {spec.name: pool[spec.source] for spec in specs if spec.source}


def measure(
    verification: VerificationResult,
    name: str,
    what: str,
    found: Tensor,
    expected: Tensor,
    own: Tensor | None,
    shown: Tensor | None = None,
) -> bool:
    """Note how far an output is off, token by token. Whether it can be compared at all.

    A token passes within `verdict.threshold` of the output's largest magnitude, or within `rounding.FACTOR` times what
    PyTorch itself is off by there. `own`: that, absolute, [rows, tokens]; `shown`: a mask of the tokens that count.
    """
    if found.shape != expected.shape:
        verification.failures.append(f"{name} has shape {tuple(found.shape)}, PyTorch gives {tuple(expected.shape)}")
        return False
    scale = max(float(expected.abs().max()), 1e-6)
    errors = token_errors(found, expected) / scale  # [rows, tokens]
    finite = bool(errors.isfinite().all())
    allowed = allowed_errors(own, scale, verification.threshold, errors)
    if shown is not None:  # what is not finite counts everywhere
        errors = torch.where((shown == 0) & errors.isfinite(), 0.0, errors)
    used = (errors / allowed).nan_to_num(torch.inf, torch.inf)
    furthest = used if used.max() > 1 else errors
    row, token = divmod(int(furthest.argmax()), used.shape[1])
    measured = Difference(
        error=float(errors[row, token]),
        torch_error=float(own[row, token] / scale) if own is not None and own[row, token].isfinite() else None,
        allowed=float(allowed[row, token]),
        location=f"{what}: row {row + 1}, token {token + 1}",
    )
    before = verification.outputs.get(name)
    if before is None or before.rank < measured.rank:
        verification.outputs[name] = measured
    if not measured.passed:
        beside = "unknown" if measured.torch_error is None else f"{measured.torch_error:.1e}"
        verification.failures.append(
            f"{name} is off by {measured.error:.1e} of its largest value, allowed {measured.allowed:.1e}, "
            f"PyTorch's own {verification.precision} {beside} ({measured.location})"
        )
    return finite
