"""What torch has no kernel of its own for, each in one launch on a GPU: heads out of rows, and gates.

torch's own functions take their place on other devices, for FP32, and where features don't lie in pairs.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.engine import kernel
from accel.engine.kernel import compiler
from accel.engine.kernel.records import ACTIVATIONS, ANGLES, NORMS
from accel.engine.operations.activations import Activation
from accel.engine.operations.attention import Attention, Heads, Rotary, angle_count, angles_of, cut_heads, rotated
from accel.engine.streams import cupy_stream

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
GATE_THREADS, GATE_ELEMENTS = 256, 8  # of a block; of a thread
ROWS_OF_BLOCK = 4  # in `heads.cu`, each of a warp
QKV = tuple[Tensor, Tensor, Tensor]


def gated(x: Tensor, y: Tensor, activation: Activation, beta: float) -> Tensor:
    """Return activation(x) * y * beta, of tensors of one shape. x may be overwritten."""
    if not _by_kernel(x, y) or x.numel() % GATE_ELEMENTS:
        result = activation(x) * y
        return result * beta if beta != 1 else result
    function = _gate_function(activation, beta, x.dtype, x.device)
    blocks = -(-x.numel() // (GATE_ELEMENTS * GATE_THREADS))
    _launch(function, (blocks,), GATE_THREADS, [x, y, np.int64(x.numel())])
    return x


def heads_of(rows: QKV, shape: tuple[int, int], tensors: list[Tensor], spec: Attention) -> QKV:
    """Return queries [B, H, N, D], keys and values [B, KV, N, D] out of rows of features, normed and rotated.

    Args:
        rows: Rows that hold queries, keys and values, each [B * N, ..., features].
        shape: B and N.
        tensors: Weights of the norms of queries, keys and values, where they have them; cosines and sines.
        spec: The attention, which has a key.
    """
    if spec.key is None or spec.value is None:
        raise ValueError("attention to a fixed cache has no keys of its own")
    flat = [each.reshape(len(each), -1) for each in rows]
    cuts = (spec.query, spec.key, spec.value)
    norms = [None if cut.norm is None else tensors.pop(0) for cut in cuts]
    angles = [] if spec.rotary is None else [each.reshape(-1, angle_count(spec.rotary)) for each in tensors[:2]]
    plain = _by_kernel(*flat, *(norm for norm in norms if norm is not None)) and _in_pairs(flat, cuts, spec.rotary)
    if plain and len({numbers.dtype for numbers in angles} - {torch.float32, flat[0].dtype}) == 0:
        return _heads_by_kernel(flat, shape, cuts, norms, angles, spec.rotary)
    found = []
    for index, (each, cut, norm) in enumerate(zip(flat, cuts, norms, strict=True)):
        heads = cut_heads(each, cut, [] if norm is None else [norm])  # [R, heads, D]
        if spec.rotary is not None and index < 2:
            cos, sin = (angles_of(numbers, spec.rotary) for numbers in angles)
            heads = rotated(heads, cos, sin, spec.rotary)
        found.append(heads.to(each.dtype).unflatten(0, shape).transpose(1, 2).contiguous())
    return found[0], found[1], found[2]


def _heads_by_kernel(
    flat: Sequence[Tensor],
    shape: tuple[int, int],
    cuts: Sequence[Heads],
    norms: Sequence[Tensor | None],
    angles: Sequence[Tensor],
    rotary: Rotary | None,
) -> QKV:
    """Return `heads_of` by the kernel, out of rows [R, features]."""
    batch, length = shape
    query, key, value = cuts
    results = [flat[0].new_empty(batch, length, query.count, query.size)]  # as attention returns its output
    results += [flat[0].new_empty(batch, cut.count, length, cut.size) for cut in (key, value)]
    arguments: list[Any] = []
    for each in flat:
        arguments += [each, np.int64(each.stride(0))]
    arguments += norms
    wide = False
    for numbers in angles:
        wide = numbers.dtype == torch.float32
        arguments += [numbers, np.int64(numbers.stride(0) if len(numbers) > 1 else 0)]
    if not angles:
        arguments += [None, np.int64(0)] * 2
    arguments += [*results, np.int32(batch * length), np.int32(length)]
    function = _heads_function(tuple(cuts), rotary, flat[0].dtype, wide, flat[0].device)
    grid = (-(-batch * length // ROWS_OF_BLOCK), sum(cut.count for cut in cuts))
    _launch(function, grid, ROWS_OF_BLOCK * 32, arguments)
    return results[0].transpose(1, 2), results[1], results[2]


def _by_kernel(*tensors: Tensor) -> bool:
    """Return whether a kernel reads such tensors: on a GPU, contiguous rows, all of one type of 16 bits."""
    first = tensors[0]
    return first.is_cuda and all(
        each.dtype == first.dtype and each.dtype in SIXTEEN_BITS and each.stride(-1) == 1 for each in tensors
    )


def _in_pairs(flat: Sequence[Tensor], cuts: Sequence[Heads], rotary: Rotary | None) -> bool:
    """Return whether two neighbouring features, at even places, are always of one head, and rotated alike."""
    places = [number for cut in cuts for number in (cut.start, cut.group_stride, cut.stride, cut.size)]
    places += [int(place) for each in flat for place in (each.stride(0), each.storage_offset())]
    return all(place % 2 == 0 for place in places) and (rotary is None or rotary.size % 4 == 0)


def gate_source(activation: Activation, beta: float, dtype: torch.dtype) -> str:
    """Return the source of the kernel `gate`."""
    macros = {
        "BF16": int(dtype == torch.bfloat16),
        "ACTIVATION": ACTIVATIONS.index(activation.name),
        "LIMIT": f"{float(activation.limit)}f",
        "BETA": f"{float(beta)}f",
    }
    return _source("gate", macros)


def heads_source(cuts: tuple[Heads, ...], rotary: Rotary | None, dtype: torch.dtype, wide_angles: bool) -> str:
    """Return the source of the kernel `heads`.

    Args:
        cuts: Heads of queries, keys and values.
        rotary: Rotation of queries and keys, or None.
        dtype: Dtype of the features.
        wide_angles: Cosines and sines are FP32, not of that dtype.
    """
    columns: dict[str, list[Any]] = {
        "COUNT": [cut.count for cut in cuts],
        "START": [cut.start for cut in cuts],
        "PER_GROUP": [cut.per_group for cut in cuts],
        "GROUP_STRIDE": [cut.group_stride for cut in cuts],
        "STRIDE": [cut.stride for cut in cuts],
        "SIZE": [cut.size for cut in cuts],
        "SCALE": [f"{float(cut.scale)}f" for cut in cuts],
        "NORM": [NORMS[None if cut.norm is None else cut.norm.kind] for cut in cuts],
        "EPSILON": [f"{0.0 if cut.norm is None else float(cut.norm.epsilon)}f" for cut in cuts],
    }
    macros: dict[str, Any] = {
        "BF16": int(dtype == torch.bfloat16),
        "WIDE_ANGLES": int(wide_angles),
        "ROTARY": 0 if rotary is None else rotary.size,
        "INTERLEAVED": int(rotary is not None and rotary.interleaved),
        "ANGLES": 0 if rotary is None else ANGLES.index(rotary.angles),
    }
    return _source("heads", macros | {name: ", ".join(map(str, column)) for name, column in columns.items()})


def _source(name: str, macros: dict[str, Any]) -> str:
    """Return the source of a kernel of this package."""
    numbers = files(kernel).joinpath("numbers.cu").read_text(encoding="utf-8")
    text = files(__package__).joinpath(f"{name}.cu").read_text(encoding="utf-8")
    return "\n".join([*(f"#define {key} {value}" for key, value in macros.items()), numbers, text])


@cache
def _gate_function(activation: Activation, beta: float, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the kernel `gate` on a device."""
    return compiler.load(gate_source(activation, beta, dtype), "gate", device)[0]


@cache
def _heads_function(
    cuts: tuple[Heads, ...], rotary: Rotary | None, dtype: torch.dtype, wide_angles: bool, device: torch.device
) -> Any:
    """Return the kernel `heads` on a device."""
    return compiler.load(heads_source(cuts, rotary, dtype, wide_angles), "heads", device)[0]


def _launch(function: Any, grid: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> None:
    """Launch a kernel on torch's current stream. Tensors among the arguments are passed as addresses, None as 0."""
    passed = [
        np.uint64(0) if each is None else np.uint64(each.data_ptr()) if isinstance(each, Tensor) else each
        for each in arguments
    ]
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    _call(device, function, grid, (threads,), tuple(passed))


def _call(device: torch.device, function: Any, *arguments: Any) -> None:
    """Call CuPy's function of a kernel on torch's current stream."""
    with torch.cuda.device(device), cupy_stream(torch.cuda.current_stream(device)):
        function(*arguments)
