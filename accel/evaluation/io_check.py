"""Check of an adapter's tensor specs against the inputs and outputs of the PyTorch model, before it is traced."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from accel.adapters.types import Architecture, Component, Signature, TensorSpec
from accel.errors import AccelError, unknown
from accel.evaluation.component_runner import ComponentRunner, Shape, component_inputs, signatures, torch_run

WRAPPER_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)  # of an adapter's or model's code


def axis_lengths(component: Component, shape: Shape) -> dict[str, int]:
    """Return every axis name that a tensor spec of `component` may use, with its length at `shape`."""
    lengths = {"batch_size": shape.batch, "source": shape.source}
    if component is Component.PREFILL:
        prefix = max(shape.past, 1)
        lengths |= {"new": prefix, "kept": prefix, "total": prefix}
    elif component is not Component.ENCODER:
        lengths |= {"new": shape.new, "kept": shape.new, "past": shape.past, "total": shape.past + shape.new}
    return lengths


@dataclass
class SpecCheck:
    """Check of one component's tensor specs against its values at several shapes.

    Attributes:
        component: Component under check.
        signature: Its signature.
        unnamed_sizes: (tensor, axis) -> size of that axis in the first call, for axes that the spec doesn't name.
    """

    component: Component
    signature: Signature
    unnamed_sizes: dict[tuple[str, int], int] = field(default_factory=dict)

    def __call__(self, shape: Shape, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Check the values of one call at `shape`.

        Raises:
            AccelError: If a value's axes differ from those of its tensor spec. Names tensor, axis and shape.
        """
        lengths = axis_lengths(self.component, shape)
        for spec in self.signature.inputs:
            self._check(spec, inputs[spec.name], lengths)
        for spec in self.signature.outputs:
            self._check(spec, outputs[spec.name], lengths)

    def _check(self, spec: TensorSpec, value: Tensor, lengths: Mapping[str, int]) -> None:
        """Raise `AccelError` unless `value` has the axes of `spec`."""
        tensor = f"export of {self.component}: {spec.name}"
        actual = f"the model's has shape {list(value.shape)}"
        for axis, name in spec.axes.items():
            if name not in lengths:
                raise unknown(f"axis of {spec.name} ({self.component})", name, lengths)
            if not 0 <= axis < value.ndim:
                raise AccelError(f"{tensor} should have an axis {axis} ({name}); {actual}")
            if value.shape[axis] != lengths[name]:
                raise AccelError(f"{tensor}: axis {axis} should be as long as {name}, here {lengths[name]}; {actual}")
        for axis, size in enumerate(value.shape):
            if axis in spec.axes:
                continue
            first_size = self.unnamed_sizes.setdefault((spec.name, axis), size)
            if size != first_size:
                raise AccelError(
                    f"{tensor}: axis {axis} has no name, so its length should always be {first_size}; {actual}. "
                    "Name the axis in the architecture's `axes`"
                )


def check_specs(architecture: Architecture, model: PreTrainedModel, shapes: Sequence[Shape], seed: int) -> None:
    """Run every component in PyTorch and compare its inputs and outputs with the adapter's tensor specs.

    Args:
        architecture: Adapter to check.
        model: Model to run.
        shapes: Sizes of the inputs of each run; two of them should differ in every length.
        seed: Seed of the random inputs.

    Raises:
        AccelError: If two tensors share a name, an axis has an unexpected length, or a wrapper fails. Names the
            component and the tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    specs = signatures(architecture, model.config)
    for component, signature in specs.items():
        _check_unique_names(component, signature)
    checks = {component: SpecCheck(component, signature) for component, signature in specs.items()}
    with _as_accel_error(f"export: can't make the wrappers for {type(model).__name__}"):
        runner = ComponentRunner(specs, torch_run(architecture, model))
    for shape in shapes:
        for component, caller_inputs in component_inputs(architecture, model.config, shape, generator).items():
            inputs = runner.inputs(component, caller_inputs)
            with _as_accel_error(f"export of {component}: its wrapper fails on {type(model).__name__}, {shape}"):
                outputs = runner(component, caller_inputs)
            checks[component](shape, inputs, outputs)


@contextmanager
def _as_accel_error(message: str) -> Iterator[None]:
    """Turn an exception of the adapter's or the model's code into an `AccelError` that begins with `message`."""
    try:
        yield
    except WRAPPER_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0]
        raise AccelError(f"{message}: {type(error).__name__}: {reason}") from error


def _check_unique_names(component: Component, signature: Signature) -> None:
    """Raise `AccelError` if two inputs or two outputs have the same name."""
    for specs in (signature.inputs, signature.outputs):
        names = Counter(spec.name for spec in specs)
        for name, count in names.items():
            if count > 1:
                raise AccelError(f"export of {component}: {count} tensor specs have the name {name!r}")
