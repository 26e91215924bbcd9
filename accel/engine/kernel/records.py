"""Records of the kernel's operation list, and the shapes of operations as it is compiled for them."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_uint64
from dataclasses import dataclass

from accel.engine.low_bits import LowBits

WORDS, WORDS_F32, PLAIN, PLAIN_F32 = range(4)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "tanh", "sigmoid", "softcap")
NORMS = {None: 0, "rms": 1, "layer": 2}
ANGLES = ("full", "halves", "pairs")
MAX_POINTERS = 34
PART = ("weight", "gate", "scales", "bias", "gate_bias", "out")
FIRST_PART = 3  # after x, weight and bias of the norm
KV_BYTES = 16384  # of keys or values in a slot of the ring
SEGMENT = 2048  # bytes of a weight's row in a slot of the ring
UNITS = 8  # rows of weights in a slot


class Record(ctypes.Structure):
    """An operation of the list: its shape, and where its tensors are."""

    _fields_ = [
        *((name, c_int) for name in ("shape", "length", "set", "positions")),
        ("pointers", c_uint64 * MAX_POINTERS),
    ]


@dataclass(frozen=True)
class Shape:
    """What is constant in an operation: the code is compiled for it.

    Attributes:
        kind: `product`, `normalize` or `attention`.
        body: Members of a C++ struct.
    """

    kind: str
    body: str


def slot_bytes(scale_bytes: int) -> int:
    """Return the bytes of a slot of the ring, with its barriers: see `common.cu`.

    Args:
        scale_bytes: Bytes of the scales in it.
    """
    return UNITS * (SEGMENT + 64) + scale_bytes + 16


def scale_bytes(low: LowBits) -> int:
    """Return the bytes of the scales, and of zero points where there are any, of the weights in a slot of the ring."""
    return SEGMENT * 8 // low.bits // low.block * UNITS * (4 if low.zero_points else 2)


def keys_in_slot(size: int) -> int:
    """Return how many keys of `size` features are in a slot of the ring: as many for each of eight warps."""
    return KV_BYTES // (2 * size) // 8 * 8


def enum(**values: int) -> str:
    """Return constants as an enumeration."""
    return "enum { " + ", ".join(f"{name} = {int(value)}" for name, value in values.items()) + " };"


def function(kind: str, name: str, values: Sequence[object]) -> str:
    """Return a function from an index to a constant."""
    result = " : ".join(f"i == {index} ? {_literal(value)}" for index, value in enumerate(values))
    return f"static __device__ constexpr {kind} {name}(int i) {{ return {result}{' : ' if result else ''}0; }}"


def number(name: str, value: float) -> str:
    """Return a function of a constant number."""
    return f"static __device__ constexpr float {name}() {{ return {_literal(float(value))}; }}"


def _literal(value: object) -> str:
    """Return a value in C++."""
    return f"{value!r}f" if isinstance(value, float) else str(int(value))  # type: ignore[call-overload]
