"""Holds an adapter's ports against what the model gives, before anything is traced."""

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


def lengths(component: Component, shape: Shape) -> dict[str, int]:
    """Every axis that a port of `role` may have -> its length at `shape`."""
    first = max(shape.past, 1)
    always = {"batch": shape.batch, "source": shape.source}
    if component is Component.ENCODER:
        return always
    if component is Component.PREFILL:
        return always | {"new": first, "kept": first, "total": first}
    return always | {"new": shape.new, "kept": shape.new, "past": shape.past, "total": shape.past + shape.new}


@dataclass
class SpecCheck:
    """Sees one role's values at several shapes. `fixed`: what each dimension without a name was at first."""

    component: Component
    signature: Signature
    fixed: dict[tuple[str, int], int] = field(default_factory=dict)

    def __call__(self, shape: Shape, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Raises `AccelError` naming the port, what was expected of it, and what the model gave."""
        known = lengths(self.component, shape)
        for specs, values in ((self.signature.inputs, inputs), (self.signature.outputs, outputs)):
            for spec in specs:
                self._check(spec, values[spec.name], known)

    def _check(self, spec: TensorSpec, value: Tensor, known: Mapping[str, int]) -> None:
        where, gave = f"export of {self.component}: {spec.name}", f"the model gave {list(value.shape)}"
        for axis, name in spec.axes.items():
            if name not in known:
                raise unknown(f"axis of {spec.name} ({self.component})", name, known)
            if not 0 <= axis < value.ndim:
                raise AccelError(f"{where} has axis {axis} ({name}), {gave}")
            if value.shape[axis] != known[name]:
                raise AccelError(f"{where}: axis {axis} should be as long as {name}, here {known[name]}; {gave}")
        for axis, size in enumerate(value.shape):
            if axis not in spec.axes and self.fixed.setdefault((spec.name, axis), size) != size:
                raise AccelError(
                    f"{where}: axis {axis} has no name, so it should always be {self.fixed[spec.name, axis]}; {gave}"
                )


def check_specs(architecture: Architecture, model: PreTrainedModel, shapes: Sequence[Shape], seed: int) -> None:
    """Run every role in PyTorch at `shapes`, which should differ in every length, and hold its ports against them.

    Raises `AccelError` naming role and port where names clash, lengths differ, or the wrapper fails.
    """
    generator = torch.Generator().manual_seed(seed)
    specs = signatures(architecture, model.config)
    for component, signature in specs.items():
        _refuse_twins(component, signature)
    checks = {component: SpecCheck(component, signature) for component, signature in specs.items()}
    with _explained(f"export: the wrappers can't be made for {type(model).__name__}"):
        runner = ComponentRunner(specs, torch_run(architecture, model))
    for shape in shapes:
        for component, given in component_inputs(architecture, model.config, shape, generator).items():
            inputs = runner.inputs(component, given)
            with _explained(f"export of {component}: its wrapper fails on {type(model).__name__}, {shape}"):
                outputs = runner(component, given)
            checks[component](shape, inputs, outputs)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raises `AccelError` for what an adapter's code or the model's makes of wrong inputs."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise AccelError(f"{what}: {type(error).__name__}: {reason}") from error


def _refuse_twins(component: Component, signature: Signature) -> None:
    for specs in (signature.inputs, signature.outputs):
        names = Counter(spec.name for spec in specs)
        for name, count in names.items():
            if count > 1:
                raise AccelError(f"export of {component}: {count} ports have the name {name!r}")
