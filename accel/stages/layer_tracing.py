"""Trace a module with only the first of its layers, where the others differ from them in nothing but weights."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from transformers import PretrainedConfig

from accel.adapters.types import Signature
from accel.graph.passes import NoMatchError
from accel.graph.repeat_layers import RepeatLayers, Stack

logger = logging.getLogger(__name__)


def find_stack(wrapper: nn.Module, config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> Stack | None:
    """Return the layers of a module, and how many of them must be traced; None if there is no such list.

    The layers traced are one to `period` that may be special, and two blocks to compare.

    Args:
        wrapper: A component's module. It runs once, to find out which lists of modules it uses.
        config: The model's config, whose lists with an element a layer, such as `layer_types`, say after how many
            layers their kinds repeat.
        inputs: Its inputs, in order.
    """
    candidates = {
        path: module
        for path, module in wrapper.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 3 and len({type(layer) for layer in module}) == 1
    }
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, layers in candidates.items()
        for layer in layers
    ]
    with torch.no_grad():
        wrapper(*inputs.values())
    for hook in hooks:
        hook.remove()
    outer = [path for path in called if not any(path.startswith(f"{other}.") for other in called)]
    if len(outer) != 1:
        return None
    total = len(candidates[outer[0]])
    kinds = _kinds(config, total)
    for period in range(1, total // 2):
        special = total % period or period
        if all(kinds[i] == kinds[i + period] for i in range(special, total - period)):
            traced = special + 2 * period
            return Stack(outer[0], traced, period, total) if traced < total else None
    return None


def _kinds(config: PretrainedConfig, total: int) -> list[tuple[Any, ...]]:
    """Return what the config says of each layer, in its lists with one element a layer."""
    parts = (config.get_text_config(decoder=True), config.get_text_config(encoder=True))
    lists = [value for part in parts for value in part.to_dict().values() if isinstance(value, list)]
    by_layer = [values for values in lists if len(values) == total]
    return list(zip(*by_layer, strict=True)) if by_layer else [()] * total


@contextmanager
def first_layers(wrapper: nn.Module, stack: Stack) -> Iterator[None]:
    """Leave a module only the layers to trace within the context."""
    parent_path, _, name = stack.path.rpartition(".")
    parent = wrapper.get_submodule(parent_path)
    layers = parent.get_submodule(name)
    setattr(parent, name, nn.ModuleList(list(layers.children())[: stack.traced]))
    try:
        yield
    finally:
        setattr(parent, name, layers)


def caches_by_layer(signature: Signature, outputs: Mapping[str, str], total: int) -> list[list[str]]:
    """Return the names of the cache inputs and outputs of each of `total` layers.

    Args:
        signature: Tensor specs of the component.
        outputs: Cache input -> the output that becomes it, of all components, in layer order.
        total: Number of layers.

    Raises:
        ValueError: The caches don't divide evenly into layers.
    """
    own = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    if len(outputs) % total:
        raise ValueError(f"{len(outputs)} caches of {total} layers")
    size = len(outputs) // total
    pairs = list(outputs.items())
    return [
        [name for pair in pairs[layer * size : (layer + 1) * size] for name in pair if name in own]
        for layer in range(total)
    ]


def without_layers(signature: Signature, caches: Sequence[Sequence[str]]) -> Signature:
    """Return a signature without the caches of some layers."""
    left_out = {name for names in caches for name in names}
    return Signature(
        tuple(spec for spec in signature.inputs if spec.name not in left_out),
        tuple(spec for spec in signature.outputs if spec.name not in left_out),
    )


def complete(graph: ir.Model, wrapper: nn.Module, stack: Stack, caches: Sequence[Sequence[str]]) -> None:
    """Add the layers that were not traced to a graph, with the weights of `wrapper`, which has them all.

    Raises:
        NoMatchError: The layers that were traced differ.
    """
    tensors: dict[str, Any] = dict(wrapper.named_parameters(remove_duplicate=False))
    tensors.update(wrapper.named_buffers(remove_duplicate=False))

    def weight(name: str) -> TorchTensor:
        if name not in tensors:
            raise NoMatchError(f"the model has no {name}")
        return TorchTensor(tensors[name].detach(), name=name)

    RepeatLayers(stack, caches, weight)(graph)
