"""`config.pbtxt`, the description of a model that Triton reads.

Its schema: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from accel.errors import AccelError
from accel.runtime import layout

TYPES = {onnx.TensorProto.INT32: "TYPE_INT32", onnx.TensorProto.INT64: "TYPE_INT64"}
LIMITS = "limits"  # key of a parameter: section `serve` of the configuration, as JSON


@dataclass(frozen=True)
class Tensor:
    """An input or output in `config.pbtxt`.

    Attributes:
        name: Its name.
        data_type: Its type, by Triton's name.
        dims: Its shape; -1: any length.
    """

    name: str
    data_type: str
    dims: int


def ids_type(files: layout.DeployableFiles) -> str:
    """Return Triton's name for the dtype of the token ids that a deployable's first graph takes.

    Raises:
        AccelError: The deployable doesn't take token ids.
    """
    path = files.encoder if files.has_encoder else files.decoder
    inputs = {item.name: item.type.tensor_type for item in onnx.load(path, load_external_data=False).graph.input}
    if layout.IDS not in inputs:
        raise AccelError(f"{path} takes {', '.join(inputs)}: a model for Triton must take {layout.IDS}")
    return TYPES[inputs[layout.IDS].elem_type]


def inputs(ids: str) -> list[Tensor]:
    """Return the inputs, all of them optional, with token ids of type `ids`."""
    return [
        Tensor("text_input", "TYPE_STRING", 1),
        Tensor("input_ids", ids, -1),
        Tensor("generation_parameters", "TYPE_STRING", 1),
        Tensor("stream", "TYPE_BOOL", 1),
    ]


def outputs(ids: str) -> list[Tensor]:
    """Return the outputs, with token ids of type `ids`."""
    return [
        Tensor("text_output", "TYPE_STRING", 1),
        Tensor("output_ids", ids, -1),
        Tensor("finish_reason", "TYPE_STRING", 1),
    ]


def config_text(name: str, ids: str, on_gpu: bool, instances: int, limits: str) -> str:
    """Return the text of `config.pbtxt`, in protobuf's text format.

    The model is decoupled, since a request has several responses, and batches requests itself (`max_batch_size: 0`).

    Args:
        name: Name of the model.
        ids: Type of token ids, by Triton's name.
        on_gpu: Instances run on GPUs.
        instances: Number of instances, on each GPU or on the CPU.
        limits: Limits of requests, as JSON.
    """
    kind = "KIND_GPU" if on_gpu else "KIND_CPU"
    lines = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        _tensors("input", inputs(ids), " optional: true"),
        _tensors("output", outputs(ids), ""),
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
        f"parameters {{ key: {_quoted(LIMITS)} value {{ string_value: {_quoted(limits)} }} }}",
    ]
    return "\n".join(lines) + "\n"


def _tensors(field: str, tensors: Sequence[Tensor], more: str) -> str:
    """Return the list of inputs or outputs."""
    items = [
        f'  {{ name: "{tensor.name}" data_type: {tensor.data_type} dims: [ {tensor.dims} ]{more} }}'
        for tensor in tensors
    ]
    return f"{field} [\n" + ",\n".join(items) + "\n]"


def _quoted(text: str) -> str:
    """Return a text of printable characters in quotes: JSON's escapes for quotes and backslashes are protobuf's too."""
    return json.dumps(text, ensure_ascii=False)
