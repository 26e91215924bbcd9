"""Weights loaded into device memory once and shared by all sessions that use them.

A session that opens a file loads a copy of the weights of its own. Here they are loaded once into tensors, which every
session takes as initializers:
https://onnxruntime.ai/docs/api/python/api_summary.html#onnxruntime.SessionOptions.add_initializer
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from accel.runtime.providers import onnxruntime

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
        """Load those weights of a graph that are in external data files.

        Args:
            graph: Path of the ONNX file.

        Returns:
            Initializer -> OrtValue, which keeps its memory alive.
        """
        model = onnx.load(graph, load_external_data=False)
        values = {}
        for initializer in model.graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                values[initializer.name] = onnxruntime.OrtValue.from_dlpack(self._tensor(graph.parent, initializer))
        return values

    def _tensor(self, folder: Path, initializer: onnx.TensorProto) -> Tensor:
        """Return the tensor of an initializer, loaded on first use."""
        entries = {entry.key: entry.value for entry in initializer.external_data}
        file, offset, length = entries["location"], int(entries.get("offset", 0)), int(entries["length"])
        key = (file, offset, length)
        if key not in self._tensors:
            numpy_dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type))
            mapped = np.memmap(folder / file, np.uint8, "c", offset, (length,))
            tensor = torch.from_numpy(mapped).to(self.device)
            dtype = torch.bfloat16 if numpy_dtype.name == "bfloat16" else getattr(torch, numpy_dtype.name)
            self._tensors[key] = tensor.view(dtype).view(*initializer.dims)
        return self._tensors[key]
