"""Weights loaded into device memory once and shared by all sessions that use them.

A session that opens a file loads a copy of the weights of its own. Here they are loaded once into tensors, which every
session takes as initializers:
https://onnxruntime.ai/docs/api/python/api_summary.html#onnxruntime.SessionOptions.add_initializer
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from accel.errors import AccelError
from accel.runtime.providers import onnxruntime

if TYPE_CHECKING:
    import onnx

DataRange = tuple[str, int, int]
"""Data file, offset and length of a weight in it, in bytes."""


class SharedWeights:
    """Weights that the graphs of one folder keep in external data files, each loaded once.

    Args:
        device: Device to load them to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[DataRange, Tensor] = {}

    def initializers(self, graph: Path) -> Mapping[str, Any]:
        """Return `tensors` for ONNX Runtime: initializer -> OrtValue, which keeps its memory alive."""
        return {name: onnxruntime.OrtValue.from_dlpack(tensor) for name, tensor in self.tensors(graph).items()}

    def tensors(self, graph: Path) -> Mapping[str, Tensor]:
        """Load those weights of a graph that are in external data files.

        Args:
            graph: Path of the ONNX file.

        Returns:
            Initializer -> tensor on the device.

        Raises:
            AccelError: A data file is outside the graph's folder, or can't be read.
        """
        import onnx  # here, as only a model with static caches needs it

        model = onnx.load(graph, load_external_data=False)
        return {
            initializer.name: self._tensor(graph, initializer)
            for initializer in model.graph.initializer
            if initializer.data_location == onnx.TensorProto.EXTERNAL
        }

    def _tensor(self, graph: Path, initializer: "onnx.TensorProto") -> Tensor:
        """Return the tensor of an initializer, loaded on first use."""
        from onnx.helper import tensor_dtype_to_np_dtype

        entries = {entry.key: entry.value for entry in initializer.external_data}
        file, offset, length = entries["location"], int(entries.get("offset", 0)), int(entries["length"])
        key = (file, offset, length)
        if key not in self._tensors:
            numpy_dtype = np.dtype(tensor_dtype_to_np_dtype(initializer.data_type))
            path = data_path(graph, file)
            try:
                mapped = np.memmap(path, np.uint8, "c", offset, (length,))
            except (OSError, ValueError) as error:  # missing, or shorter than offset and length
                raise AccelError(f"can't read {length} bytes at {offset} of {path}: {error}") from error
            tensor = torch.from_numpy(mapped).to(self.device)
            dtype = torch.bfloat16 if numpy_dtype.name == "bfloat16" else getattr(torch, numpy_dtype.name)
            self._tensors[key] = tensor.view(dtype).view(*initializer.dims)
        return self._tensors[key]


def data_path(graph: Path, location: str) -> Path:
    """Return the path of an external data file, which must be in the graph's folder, as ONNX Runtime demands.

    Links are followed: the file that they lead to must be in the folder as well, or beside the file that `graph` itself
    is a link to, as in the Hugging Face hub's cache.

    Args:
        graph: Path of the ONNX file.
        location: Path that the graph gives, relative to its folder.

    Raises:
        AccelError: It leads out of the folder.
    """
    path = graph.parent / location
    folders = (graph.parent.resolve(), graph.resolve().parent)
    inside = not Path(location).is_absolute() and ".." not in Path(location).parts
    if not inside or not any(path.resolve().is_relative_to(folder) for folder in folders):
        raise AccelError(f"{graph} reads weights from {location!r}, which is outside its folder: refused")
    return path
