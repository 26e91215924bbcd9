"""The kernels of a prefill: they compile for all GPUs, and compute what torch's functions in their place do."""

import ctypes
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accel.engine.operations.activations import ACTIVATIONS, Activation
from accel.engine.operations.attention import Attention, Heads, Rotary
from accel.engine.operations.normalize import Norm
from accel.engine.prefill import kernels
from tests.engine.kernel.emulator import compiled, on_host
from tests.engine.kernel.nvrtc import compile_for

HALF = torch.float16
WIDTH = 4 * 24 + 2 * 2 * 24  # features of a row: queries, keys and values, side by side
APART = Attention(  # four heads of queries, two of keys and values, of 24 features
    query=Heads(start=0, groups=1, per_group=4, group_stride=96, stride=24, size=24),
    key=Heads(start=96, groups=1, per_group=2, group_stride=48, stride=24, size=24),
    value=Heads(start=144, groups=1, per_group=2, group_stride=48, stride=24, size=24),
    kv_heads=2,
    rotary=None,
    scale=0.2,
    softcap=0.0,
    biases=(),
    dtype=HALF,
)
MIXED = replace(  # in two groups of two queries, a key and a value, as Falcon has them
    APART,
    query=Heads(start=0, groups=2, per_group=2, group_stride=96, stride=24, size=24, scale=0.7),
    key=Heads(start=48, groups=2, per_group=1, group_stride=96, stride=24, size=24),
    value=Heads(start=72, groups=2, per_group=1, group_stride=96, stride=24, size=24),
)
ROTARIES = (
    None,
    Rotary(24, interleaved=False, angles="halves"),
    Rotary(16, interleaved=False, angles="full"),
    Rotary(8, interleaved=True, angles="pairs"),
)
NORMS = (None, Norm("rms", 1e-6), Norm("layer", 1e-5))


def with_norms(spec: Attention, norm: Norm | None) -> Attention:
    """Return the attention with a norm of queries and keys."""
    assert spec.key is not None
    return replace(spec, query=replace(spec.query, norm=norm), key=replace(spec.key, norm=norm))


SPECS = [
    replace(with_norms(spec, norm), rotary=rotary) for spec, norm, rotary in product((APART, MIXED), NORMS, ROTARIES)
]


def tensors_of(spec: Attention, rows: int, device: str, wide: bool) -> tuple[Tensor, list[Tensor]]:
    """Return random rows in FP16, and weights of the norms, cosines and sines of an attention."""
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randn(rows, 1, WIDTH, generator=generator).to(device, HALF)
    others = [1 + torch.randn(24, generator=generator) / 4 for norm in (spec.query.norm, spec.query.norm) if norm]
    others = [each.to(HALF) for each in others]
    if spec.rotary is not None:
        count = spec.rotary.size if spec.rotary.angles == "full" else spec.rotary.size // 2
        angles = torch.randn(rows, 2 * count, generator=generator)[:, :count]  # rows apart, as a slice of others
        others += [function(angles).to(torch.float32 if wide else HALF) for function in (torch.cos, torch.sin)]
    return packed, [each.to(device) for each in others]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles(architecture: str) -> None:
    """Without spilled registers, for every kind of norm, rotation and activation."""
    for spec, dtype in ((SPECS[1], HALF), (SPECS[6], torch.bfloat16), (SPECS[-1], HALF)):
        assert spec.key is not None
        assert spec.value is not None
        source = kernels.heads_source((spec.query, spec.key, spec.value), spec.rotary, dtype, dtype == HALF)
        assert compile_for(source, architecture).spilled == 0
    for name in ("silu", "gelu"):
        assert compile_for(kernels.gate_source(Activation(name), 0.5, HALF), architecture).spilled == 0


LAUNCH = """
extern "C" void launch(int columns, int lines, PARAMETERS) {
  for (int x = 0; x < columns; x++) for (int y = 0; y < lines; y++) {
    blockIdx = {x, y};
    std::vector<std::thread> threads;
    for (int i = 0; i < 128; i++) threads.emplace_back([=] { threadIdx.x = i; KERNEL; });
    for (auto& each : threads) each.join();
  }
}
"""


class OnHost:
    """A kernel that the host's compiler built, to be called as CuPy's functions are.

    Args:
        source: Its CUDA source.
        name: Its name.
        folder: Folder for the files.
    """

    def __init__(self, source: str, name: str, folder: Path) -> None:
        text = on_host(source).replace("static_assert(sizeof(Barrier) == 8);", "")
        found = re.search(rf"\b{name}\((.*?)\) {{", text, re.DOTALL)
        assert found is not None
        parameters = found[1]
        names = [each.split()[-1].lstrip("*") for each in parameters.split(",")]
        launch = LAUNCH.replace("PARAMETERS", parameters).replace("KERNEL", f"{name}({', '.join(names)})")
        self._launch = compiled(f"{text}\n{launch}", folder).launch

    def __call__(self, grid: tuple[int, ...], block: tuple[int], arguments: tuple[Any, ...]) -> None:
        kinds = {np.uint64: ctypes.c_uint64, np.int64: ctypes.c_int64, np.int32: ctypes.c_int32}
        blocks = (*grid, 1)[:2]
        assert block == (128,)
        self._launch(*blocks, *(kinds[type(each)](int(each)) for each in arguments))


@pytest.mark.parametrize("spec", [SPECS[5], SPECS[10], SPECS[-1]])
def test_heads_on_the_host(spec: Attention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's arithmetic, for some norms and rotations."""
    assert spec.key is not None
    assert spec.value is not None
    packed, others = tensors_of(spec, 6, "cpu", wide=True)
    expected = kernels.heads_of((packed, packed, packed), (2, 3), list(others), spec)
    source = kernels.heads_source((spec.query, spec.key, spec.value), spec.rotary, HALF, spec.rotary is not None)
    built = OnHost(source, "heads", tmp_path)
    monkeypatch.setattr(kernels, "_by_kernel", lambda *tensors: True)
    monkeypatch.setattr(kernels, "_heads_function", lambda *arguments: built)
    monkeypatch.setattr(kernels, "_call", lambda device, function, *arguments: function(*arguments))
    found = kernels.heads_of((packed, packed, packed), (2, 3), list(others), spec)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() - theirs.float()).abs().max() <= 2e-3 * theirs.float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_heads(spec: Attention, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 prompts of 7 tokens: 21 rows, which no block size divides."""
    packed, others = tensors_of(spec, 21, "cuda", wide)
    found = kernels.heads_of((packed, packed, packed), (3, 7), list(others), spec)
    launches = []
    monkeypatch.setattr(kernels, "_by_kernel", lambda *tensors: launches.append(1))  # None: torch instead
    expected = kernels.heads_of((packed, packed, packed), (3, 7), list(others), spec)
    assert launches
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.float() - theirs.float()).abs().max() <= 2e-3 * theirs.float().abs().max()
        assert theirs.float().abs().max() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_gate(name: str, dtype: torch.dtype) -> None:
    """Of a number of elements that isn't a multiple of a block's, with a factor."""
    generator = torch.Generator().manual_seed(3)
    x, y = (4 * torch.randn(37, 88, generator=generator).to("cuda", dtype) for _ in range(2))
    activation = Activation(name, 3.0)
    expected = activation(x.float()) * y.float() * 0.5
    found = kernels.gated(x, y, activation, 0.5)
    assert found.data_ptr() == x.data_ptr()
    allowed = 2 * torch.finfo(dtype).eps * expected.abs() + 1e-3
    assert bool(((found.float() - expected).abs() <= allowed).all())
