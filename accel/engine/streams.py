"""torch's streams for CuPy."""

from functools import cache
from typing import Any

import torch


@cache
def cupy_stream(stream: torch.cuda.Stream) -> Any:
    """Wrap a torch stream as a CuPy stream. From version 14 on CuPy takes torch's stream object itself."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)
