"""Export every role to ONNX, then run each at shapes unlike the example's and compare with PyTorch."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel import progress
from accel.adapters.types import Architecture, Component, Signature
from accel.config.schema import Config
from accel.errors import AccelError
from accel.evaluation.compare import token_errors
from accel.evaluation.component_runner import ComponentRunner, Shape, component_inputs, longest, signatures, torch_run
from accel.evaluation.io_check import check_specs
from accel.evaluation.rounding import SAMPLES, Evaluator, allowed_errors, root_mean_square
from accel.graph import files
from accel.graph.cleanup.widen_bfloat16 import widen_bfloat16
from accel.models.checkpoints import load_model
from accel.pipeline.stage import Stage, takes
from accel.pipeline.store import Artifact
from accel.runtime.providers import RUNTIME_ERRORS
from accel.runtime.session import HostSession, SessionSettings

# Every dimension of the example is at least 2 and unlike the others: the exporter freezes an axis of length 1. The
# source is longer than two of the blocks, 16 each, that some encoders cut it into.
EXAMPLE = Shape(batch=2, source=37, past=7, new=3)
SHAPES = (Shape(1, 1, 1, 1), Shape(1, 9, 0, 1), Shape(3, 6, 4, 2), Shape(2, 300, 2, 1), Shape(1, 11, 300, 1))


def example(
    runner: ComponentRunner, component: Component, given: Mapping[Component, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The inputs of `role` at the example's shape, made by running the roles before it."""
    for earlier in runner.signatures:
        if earlier is component:
            return runner.inputs(component, given[component])
        runner(earlier, given[earlier])
    raise AccelError(f"role {component} is not one of the architecture's: {', '.join(runner.signatures)}")


def export_role(wrapper: nn.Module, signature: Signature, inputs: Mapping[str, Tensor], opset: int) -> ir.Model:
    """One graph, with the ports' names, as the exporter leaves it. `inputs` are in the signature's order."""
    axes: tuple[Any, ...] = tuple(dict(spec.axes) for spec in signature.inputs)
    parameters = inspect.signature(wrapper.forward).parameters.values()
    named = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(axes) > named:  # the rest arrives in *past, which the exporter describes by a tuple of its own
        axes = (*axes[:named], axes[named:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            wrapper,
            tuple(inputs.values()),
            opset_version=opset,
            dynamo=True,
            optimize=False,
            dynamic_shapes=axes,
            verbose=False,
        )
    if program is None:
        raise AccelError("torch.onnx.export made no program")
    model: ir.Model = program.model
    # An initializer may already hold a port's name, so all are moved out of the way first.
    for values, specs in ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
    widen_bfloat16(model)
    return model


def name_weights(graph: ir.Model, wrapper: nn.Module, model: PreTrainedModel) -> None:
    """Give every initializer the name PyTorch knows its parameter by, also where two modules share one."""
    known = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inside = dict(wrapper.named_parameters(remove_duplicate=False)) | dict(
        wrapper.named_buffers(remove_duplicate=False)
    )
    for value in list(graph.graph.initializers.values()):
        tensor = inside.get(value.name or "")
        if tensor is not None and id(tensor) in known:
            value.name = known[id(tensor)]


@dataclass(frozen=True)
class Known:
    """What PyTorch makes of one role's inputs."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    shape: Shape


def by_pytorch(architecture: Architecture, model: PreTrainedModel, seed: int) -> dict[Component, list[Known]]:
    """Every role at every one of `SHAPES`, each fed by the outputs of those before it."""
    generator = torch.Generator().manual_seed(seed)
    specs = signatures(architecture, model.config)
    runner = ComponentRunner(specs, torch_run(architecture, model))
    found: dict[Component, list[Known]] = {component: [] for component in specs}
    for shape in progress.track([shape.within(longest(model.config)) for shape in SHAPES], "PyTorch"):
        given = component_inputs(architecture, model.config, shape, generator)
        for component in specs:
            if component is Component.DECODE and shape.past == 0:
                runner.forget_past()
            inputs = runner.inputs(component, given[component])
            found[component].append(Known(inputs, runner(component, given[component]), shape))
    return found


def compare(
    architecture: Architecture, model: PreTrainedModel, folder: Path, tolerance: float, seed: int
) -> dict[str, float]:
    """Largest difference of each role's outputs from PyTorch over `SHAPES`, relative to the output's largest magnitude.

    Raises `AccelError` naming role, output and shape where it exceeds `tolerance`, and PyTorch's own rounding doesn't
    explain it: see `rounding`. PyTorch goes first, so that each graph is opened once.
    """
    known = by_pytorch(architecture, model, seed)
    settings = SessionSettings(session={"session.disable_prepacking": "1"})  # weights stay in their file
    worst: dict[str, float] = {}
    for component, calls in progress.track(list(known.items()), "comparing with PyTorch"):
        worst[str(component)] = 0.0
        session = HostSession(folder / f"{component}.onnx", settings)
        for one in calls:
            try:
                found = session(one.inputs)
            except RUNTIME_ERRORS as error:
                reason = str(error).splitlines()[0]
                raise AccelError(f"export of {component}: ONNX Runtime can't run it ({one.shape}): {reason}") from error
            differences = _differences(component, found, one)
            worst[str(component)] = max(worst[str(component)], *differences.values())
            if beyond := [name for name, difference in differences.items() if not difference <= tolerance]:
                _check_rounding(architecture, model, component, found, one, beyond, tolerance)
    return worst


def _differences(component: Component, found: Mapping[str, Tensor], known: Known) -> dict[str, float]:
    """Output -> largest difference, relative to its largest magnitude. Raises `AccelError` on another shape."""
    differences = {}
    for name, value in known.outputs.items():
        if value.shape != found[name].shape:
            raise AccelError(
                f"export of {component}: {name} has shape {tuple(found[name].shape)}, PyTorch gives "
                f"{tuple(value.shape)} ({known.shape})"
            )
        errors = token_errors(found[name], value)
        differences[name] = float(errors.max() / value.abs().max().clamp_min(1e-6)) if errors.numel() else 0.0
    return differences


def _check_rounding(
    architecture: Architecture,
    model: PreTrainedModel,
    component: Component,
    found: Mapping[str, Tensor],
    known: Known,
    names: Sequence[str],
    tolerance: float,
) -> None:
    """Raises `AccelError` unless each output of `names` is as near to float64 as PyTorch itself is, token by token."""
    specs, run = signatures(architecture, model.config), torch_run(architecture, model)
    exact = Evaluator(model, specs, run, torch.float64).alone(component, known.inputs)
    rounded = Evaluator(model, specs, run, torch.float32).alone(component, known.inputs)
    for name in names:
        scale = float(exact[name].abs().max().clamp_min(1e-6))
        own = root_mean_square(rounded[name], exact[name], SAMPLES)  # [rows, tokens]
        errors = token_errors(found[name], exact[name]) / scale
        used = errors / allowed_errors(own, scale, tolerance, errors)
        row, token = divmod(int(used.argmax()), used.shape[1])
        if not used.max() <= 1:
            raise AccelError(
                f"export of {component}: {name} is off by {errors[row, token]:.2e} of its largest value, more than "
                f"export.tolerance={tolerance:.0e}; PyTorch's own float32 is off by {own[row, token] / scale:.2e} "
                f"there ({known.shape}: row {row + 1}, token {token + 1})"
            )


def _cause(error: BaseException) -> str:
    """What was at the bottom of it, and where to read on."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
    return f"{told}\ndocs/when-yaml-is-not-enough.md shows how a wrapper gets around it"


def run(config: Config, inputs: Mapping[str, Artifact], architecture: Architecture, out: Path) -> Mapping[str, Any]:
    """Writes `<role>.onnx` (with `<role>.onnx.data` when the weights are large) for every role."""
    model = load_model(inputs["checkpoint"].folder)
    shape, other = (one.within(longest(model.config)) for one in (EXAMPLE, SHAPES[2]))
    check_specs(architecture, model, (shape, other), config.export.seed)
    generator = torch.Generator().manual_seed(config.export.seed)
    specs = signatures(architecture, model.config)
    given = component_inputs(architecture, model.config, shape, generator)
    runner = ComponentRunner(specs, torch_run(architecture, model))
    nodes: dict[str, int] = {}
    for component, signature in progress.track(list(specs.items()), "tracing"):
        wrapper = architecture.wrap(model, component)
        try:
            graph = export_role(wrapper, signature, example(runner, component, given), config.export.opset)
        except torch.onnx.OnnxExporterError as error:
            kind = type(model).__name__
            raise AccelError(f"export of {component}: torch can't trace {kind}: {_cause(error)}") from error
        name_weights(graph, wrapper, model)
        files.save(graph, out / f"{component}.onnx")
        nodes[str(component)] = files.node_count(graph)
        del graph
    worst = compare(architecture, model, out, config.export.tolerance, config.export.seed)
    return {"nodes": nodes, "worst_relative_difference": worst}


STAGE = Stage(
    name="export",
    run=run,
    inputs=takes("checkpoint"),
    sections=("export",),
    packages=("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
)
