"""Comparison of exported graphs with PyTorch, at shapes other than those they were traced at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel import progress
from accel.adapters.types import Architecture, Component
from accel.errors import AccelError
from accel.evaluation.compare import magnitude, token_errors
from accel.evaluation.component_runner import (
    ComponentRunner,
    Shape,
    component_inputs,
    max_positions,
    signatures,
    torch_run,
)
from accel.evaluation.rounding import SAMPLES, Evaluator, allowed_errors, root_mean_square
from accel.runtime.providers import RUNTIME_ERRORS
from accel.runtime.session import HostSession, SessionSettings

# Weights stay in their file, and freed memory is not kept for the next run.
SETTINGS = SessionSettings(session={"session.disable_prepacking": "1"}, arena=False)
SHAPES = (Shape(1, 1, 1, 1), Shape(1, 9, 0, 1), Shape(3, 6, 4, 2), Shape(2, 300, 2, 1), Shape(1, 11, 300, 1))


@dataclass(frozen=True)
class TorchCall:
    """One call of a component in PyTorch."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    shape: Shape


def run_torch(architecture: Architecture, model: PreTrainedModel, seed: int) -> dict[Component, list[TorchCall]]:
    """Run every component at each of `SHAPES` in PyTorch, on random ids and the outputs of the components before it."""
    generator = torch.Generator().manual_seed(seed)
    specs = signatures(architecture, model.config)
    runner = ComponentRunner(specs, torch_run(architecture, model))
    calls: dict[Component, list[TorchCall]] = {component: [] for component in specs}
    shapes = [shape.within(max_positions(model.config)) for shape in SHAPES]
    for shape in progress.track(shapes, "PyTorch"):
        caller_inputs = component_inputs(architecture, model.config, shape, generator)
        for component in specs:
            if component is Component.DECODE and shape.past == 0:
                runner.forget_past()
            inputs = runner.inputs(component, caller_inputs[component])
            calls[component].append(TorchCall(inputs, runner(component, caller_inputs[component]), shape))
    return calls


def compare(
    architecture: Architecture,
    calls: Mapping[Component, Sequence[TorchCall]],
    folder: Path,
    tolerance: float,
    load: Callable[[], PreTrainedModel],
) -> dict[str, float]:
    """Compare the exported graphs with calls in PyTorch.

    PyTorch's model need not be in memory, where only one graph at a time is then.

    Args:
        architecture: The adapter of the model.
        calls: What `run_torch` returned.
        folder: Folder with `<component>.onnx` for each component.
        tolerance: Largest difference allowed, relative to the largest magnitude of the output.
        load: Loads the PyTorch model, in FP32; called where its rounding error must be known.

    Returns:
        The largest relative difference of each component's outputs.

    Raises:
        AccelError: An output differs by more than `tolerance`, and by more than PyTorch's own rounding error explains
            (see `accel.evaluation.rounding`). The message names component, output and shape.
    """
    worst: dict[str, float] = {}
    for component, torch_calls in progress.track(list(calls.items()), "comparing with PyTorch"):
        worst[str(component)] = 0.0
        session = HostSession(folder / f"{component}.onnx", SETTINGS)
        for call in torch_calls:
            try:
                outputs = session(call.inputs)
            except RUNTIME_ERRORS as error:
                reason = str(error).splitlines()[0]
                raise AccelError(
                    f"export of {component}: ONNX Runtime can't run it ({call.shape}): {reason}"
                ) from error
            differences = differences_of(component, outputs, call)
            worst[str(component)] = max(worst[str(component)], *differences.values())
            beyond = [name for name, difference in differences.items() if not difference <= tolerance]  # NaN counts
            if beyond:
                _check_rounding(architecture, load(), component, outputs, call, beyond, tolerance)
        del session  # before the next one opens
    return worst


def differences_of(component: Component, outputs: Mapping[str, Tensor], call: TorchCall) -> dict[str, float]:
    """Return the largest difference of each output relative to its largest magnitude; raise if shapes differ."""
    differences = {}
    for name, expected in call.outputs.items():
        if expected.shape != outputs[name].shape:
            raise AccelError(
                f"export of {component}: {name} has shape {tuple(outputs[name].shape)}, PyTorch gives "
                f"{tuple(expected.shape)} ({call.shape})"
            )
        errors = token_errors(outputs[name], expected)  # [rows, tokens]
        if errors.numel():
            differences[name] = float(errors.max()) / max(magnitude(expected), 1e-6)
        else:
            differences[name] = 0.0
    return differences


def _check_rounding(
    architecture: Architecture,
    model: PreTrainedModel,
    component: Component,
    outputs: Mapping[str, Tensor],
    call: TorchCall,
    names: Sequence[str],
    tolerance: float,
) -> None:
    """Raise `AccelError` unless PyTorch's own error against float64 explains the error of each token of `names`."""
    specs, run_component = signatures(architecture, model.config), torch_run(architecture, model)
    exact = Evaluator(model, specs, run_component, torch.float64).evaluate_isolated(component, call.inputs)
    rounded = Evaluator(model, specs, run_component, torch.float32).evaluate_isolated(component, call.inputs)
    for name in names:
        scale = max(magnitude(exact[name]), 1e-6)
        torch_errors = root_mean_square(rounded[name], exact[name], SAMPLES)  # [rows, tokens]
        errors = token_errors(outputs[name], exact[name]) / scale  # [rows, tokens]
        used = errors / allowed_errors(torch_errors, scale, tolerance, errors)  # [rows, tokens]
        row, token = divmod(int(used.argmax()), used.shape[1])
        if not used.max() <= 1:
            raise AccelError(
                f"export of {component}: {name} is off by {errors[row, token]:.2e} of its largest value, more than "
                f"export.tolerance={tolerance:.0e}; PyTorch's own float32 is off by "
                f"{torch_errors[row, token] / scale:.2e} there ({call.shape}: row {row + 1}, token {token + 1})"
            )
