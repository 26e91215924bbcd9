"""Weights in memory once, for all the sessions that read them.

A session opened over a file reads the weights into memory of its own. Here they are read once, into tensors on the
device, and every session is given those: https://onnxruntime.ai/docs/api/python/api_summary.html#onnxruntime.SessionOptions.add_initializer
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from accel.runtime.providers import onnxruntime

Place = tuple[str, int, int]  # data file, offset and length of a weight in it


class SharedWeights:
    """The weights that graphs in one folder keep in data files, each in memory once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[Place, Tensor] = {}

    def of(self, graph: Path) -> Mapping[str, Any]:
        """Initializer -> value, for those of the graph at `graph` that lie in a data file. Values hold their memory."""
        model = onnx.load(graph, load_external_data=False)
        found = {}
        for initializer in model.graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                found[initializer.name] = onnxruntime.OrtValue.from_dlpack(self._tensor(graph.parent, initializer))
        return found

    def _tensor(self, folder: Path, initializer: onnx.TensorProto) -> Tensor:
        where = {entry.key: entry.value for entry in initializer.external_data}
        place = (where["location"], int(where.get("offset", 0)), int(where["length"]))
        if place not in self._tensors:
            kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type))
            mapped = np.memmap(folder / place[0], np.uint8, "c", place[1], (place[2],))
            tensor = torch.from_numpy(mapped).to(self.device)
            dtype = torch.bfloat16 if kind.name == "bfloat16" else getattr(torch, kind.name)
            self._tensors[place] = tensor.view(dtype).view(*initializer.dims)
        return self._tensors[place]
