"""Runs the roles of an architecture one after the other, each fed by the outputs of those before it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from accel.adapter import Architecture, Role, Signature

Run = Callable[[Role, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs one role: named inputs -> named outputs. PyTorch's and ONNX Runtime's are interchangeable."""


class Chain:
    """Holds every value seen so far by name, so that caches come from running prefill and are never invented."""

    def __init__(self, signatures: Mapping[Role, Signature], run: Run) -> None:
        self.signatures = signatures
        self.run = run
        self.pool: dict[str, Tensor] = {}

    def inputs(self, role: Role, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs of `role`: those in `given`, the rest from the values seen so far."""
        return {
            port.name: self.pool[port.source] if port.source else given[port.name]
            for port in self.signatures[role].inputs
        }

    def __call__(self, role: Role, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run `role`; its inputs and outputs become available to the next one."""
        outputs = self.run(role, self.inputs(role, given))
        self.pool |= {**given, **outputs}
        return outputs

    def forget_past(self) -> None:
        """Crop the decoder's own caches to length 0; those of the encoder stay."""
        for port in self.signatures[Role.STEP].inputs:
            for axis, name in port.axes.items():
                if name == "past" and port.source:
                    self.pool[port.source] = self.pool[port.source].narrow(axis, 0, 0)


def signatures(architecture: Architecture, config: PretrainedConfig) -> dict[Role, Signature]:
    """The signature of every role of `architecture`."""
    return {role: architecture.signature(config, role) for role in architecture.roles()}


def torch_run(architecture: Architecture, model: PreTrainedModel) -> Run:
    """Runs roles in PyTorch, through the very wrappers that are exported."""
    wrappers: dict[Role, nn.Module] = {role: architecture.wrap(model, role) for role in architecture.roles()}

    @torch.no_grad()
    def run(role: Role, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        outputs = wrappers[role](*inputs.values())
        names = [port.name for port in architecture.signature(model.config, role).outputs]
        return dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))

    return run
