"""Decides whether prefill can be derived from a trace of decode, and how to call decode for that."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from accel.adapters.types import Architecture, Component, Signature
from accel.evaluation.component_runner import signatures

PAST = "past"  # name of the length axis of self-attention caches


def cross_caches(specs: Mapping[Component, Signature]) -> dict[str, str]:
    """Return the cache inputs that decode doesn't return, with the outputs of prefill that they take.

    They are the keys and values of cross-attention, which follow from the encoder's output alone; none without an
    encoder.
    """
    outputs = {spec.name for spec in specs[Component.DECODE].outputs}
    return {name: source for name, source in specs[Component.DECODE].cache.items() if source not in outputs}


def prefill_follows(architecture: Architecture, model: PreTrainedModel) -> bool:
    """Return whether one module computes prefill and decode, which differ in nothing but their caches.

    Decode takes the caches of the past. Cross-attention caches are outputs of prefill and inputs of decode.
    """
    specs = signatures(architecture, model.config)
    prefill, decode = specs[Component.PREFILL], specs[Component.DECODE]
    computed = cross_caches(specs).values()
    same_module = type(architecture.wrap(model, Component.PREFILL)) is type(architecture.wrap(model, Component.DECODE))
    same_inputs = prefill.inputs == tuple(spec for spec in decode.inputs if not spec.cached)
    same_outputs = tuple(spec for spec in prefill.outputs if spec.name not in computed) == decode.outputs
    return same_module and same_inputs and same_outputs


def without_cross_caches(
    decode: Signature, inputs: Mapping[str, Tensor], caches: Mapping[str, str]
) -> tuple[Signature, dict[str, Tensor]]:
    """Return signature and example inputs of decode with cross-attention caches of length 0.

    Transformers' `EncoderDecoderCache` counts an empty cache as not yet computed, so the decoder computes keys and
    values of the encoder's output and appends them.

    Args:
        decode: Signature of decode.
        inputs: Its example inputs.
        caches: What `cross_caches` returned.
    """
    length = next(axis for spec in decode.inputs for axis, name in spec.axes.items() if spec.cached and name == PAST)
    specs = []
    empty = dict(inputs)
    for spec in decode.inputs:
        if spec.name in caches:
            specs.append(replace(spec, axes={axis: name for axis, name in spec.axes.items() if axis != length}))
            empty[spec.name] = inputs[spec.name].narrow(length, 0, 0)
        else:
            specs.append(spec)
    return Signature(tuple(specs), decode.outputs), empty
