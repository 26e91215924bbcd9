"""Error messages name the library that CUDA needs and the extra that installs it."""

import ctypes
from typing import Any

import hydra
import pytest
import torch
from onnxruntime.capi import build_and_package_info

from accel.cli.compose import resolved_overrides
from accel.config.hydra_setup import composing
from accel.engine.kernel import launch
from accel.errors import AccelError
from accel.runtime import providers


@pytest.mark.parametrize(
    ("version", "extra"),
    [("13.0", "accel-onnx[cuda13]"), ("12.8", "accel-onnx[cuda12]"), ("11.8", "accel-onnx[cuda11]")],
)
def test_missing_library_and_its_extra(monkeypatch: pytest.MonkeyPatch, version: str, extra: str) -> None:
    """The dynamic loader's error names the library, the wheel its CUDA version."""

    def refuse(name: str, **_: Any) -> None:
        raise OSError("libcublasLt.so.13: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(build_and_package_info, "cuda_version", version, raising=False)
    message = providers.missing_library()
    assert "libcublasLt.so.13 is missing" in message
    assert f"install {extra}" in message
    assert f"CUDA {version.split('.')[0]}" in message


def test_another_loader_error_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is found but can't be loaded is not reported as missing."""

    def refuse(name: str, **_: Any) -> None:
        raise OSError("libfoo.so: undefined symbol: bar")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert "undefined symbol: bar" in providers.missing_library()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_provider_that_does_not_load_is_reported_before_any_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists CUDA and torch finds a GPU, but sessions open without the provider: reported before export."""
    monkeypatch.setattr(providers, "available_providers", lambda: [providers.CUDA, providers.CPU])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    providers._loads.cache_clear()
    with pytest.raises(AccelError, match="can't use CUDA here"):
        providers.check_provider(providers.CUDA)
    providers._loads.cache_clear()
    assert providers._loads(providers.CPU)


@pytest.mark.parametrize(
    ("listed", "found", "kernel", "preset"),
    [
        (True, True, True, "cuda-fused"),
        (True, True, False, "cuda-graph"),
        (True, False, False, "cpu"),
        (False, True, True, "cpu"),
    ],
)
def test_the_preset_that_auto_stands_for(
    listed: bool, found: bool, kernel: bool, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU static graphs are built, and steps captured; in FP16; for the kernel, but not by its name alone."""
    names = [providers.CUDA, providers.CPU] if listed else [providers.CPU]
    monkeypatch.setattr(providers, "available_providers", lambda: names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(launch, "unsupported", lambda device: None if kernel else "no CuPy")
    assert providers.fastest() == ("cpu" if preset == "cpu" else "cuda-graph")
    assert resolved_overrides(["model=t5-g2p"])[1:3] == [
        f"runtime={preset}",
        f"precision={'fp32' if preset == 'cpu' else 'fp16'}",
    ]
    with composing():
        composed = hydra.compose("config", resolved_overrides(["model=t5-g2p"]))
    assert composed.convert.static_decode is (preset != "cpu")
    assert composed.runtime.engine == "auto"
    assert composed.runtime.transpose_weights is (preset == "cuda-fused")
    in_32_bits = resolved_overrides(["model=t5-g2p", "precision=fp32"])
    assert f"runtime={'cpu' if preset == 'cpu' else 'cuda-graph'}" in in_32_bits
