"""What `runtime.engine=auto` stands for: the engine of the verification result, where the device can run it."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import accel
from accel.cli import validate
from accel.config.presets import runtime_preset
from accel.engine.kernel import compiler, launch
from accel.errors import AccelError
from accel.models import loading
from accel.runtime.engine_choice import choose_engine, engines_to_verify
from accel.runtime.layout import DeployableFiles, first_variant
from tests.conftest import Build

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


class Device:
    """What there seems to be: a GPU of some compute capability, and NVRTC of some CUDA, or no CuPy."""

    def __init__(self) -> None:
        self.capability: tuple[int, int] = (9, 0)
        self.nvrtc: tuple[int, int] | None = (12, 4)

    def module(self) -> ModuleType:
        """Return a stand-in for `cupy.cuda.nvrtc`."""
        module = ModuleType("nvrtc")
        module.getVersion = lambda: self.nvrtc  # type: ignore[attr-defined]
        module.getSupportedArchs = lambda: (75, 80, 86, 89, 90)  # type: ignore[attr-defined]
        return module


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A GPU that can run the kernel, until a test changes it."""
    found = Device()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found.capability)
    monkeypatch.setattr(compiler, "_nvrtc", found.module)
    monkeypatch.setattr(compiler, "find_spec", lambda name: name if found.nvrtc else None)
    launch.unsupported.cache_clear()
    yield found
    launch.unsupported.cache_clear()


def deployable(folder: Path, **result: object) -> DeployableFiles:
    """Return the files of a folder with this verification result; none if `result` is empty."""
    files = first_variant_of(folder)
    if result:
        files.verification.write_text(json.dumps(result))
    return files


def first_variant_of(folder: Path) -> DeployableFiles:
    """Return the only variant of a folder that holds an empty merged decoder."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "decoder_model_merged.onnx").touch()
    return first_variant(folder)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"passed": True, "engine": "fused"}, "fused"),
        ({"passed": True, "engine": "onnxruntime"}, "onnxruntime"),
        ({"passed": False, "engine": "fused"}, "onnxruntime"),
        ({"passed": True}, "onnxruntime"),  # of an earlier version
        ({}, "onnxruntime"),  # nobody verified it
    ],
)
def test_what_is_verified_is_what_runs(
    result: dict[str, object],
    expected: str,
    device: Device,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = deployable(tmp_path, **result)
    assert choose_engine("auto", files, GPU) == expected
    for name in ("onnxruntime", "fused"):
        assert choose_engine(name, files, GPU) == name
    assert warnings(caplog) == []


LACKING = [
    ((7, 5), (12, 4), "the device has compute capability 7.5, and the kernel needs 8.0"),
    ((9, 0), None, "the kernel is compiled by CuPy, which is not installed"),
    ((9, 0), (11, 8), "the kernel needs NVRTC of CUDA 12 or later, not 11.8"),
]


@pytest.mark.parametrize(("capability", "nvrtc", "reason"), LACKING)
def test_what_a_gpu_lacks(
    capability: tuple[int, int],
    nvrtc: tuple[int, int] | None,
    reason: str,
    device: Device,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`auto` falls back with one warning that names it; the engine asked for by name is refused before any stage."""
    device.capability, device.nvrtc = capability, nvrtc
    files = deployable(tmp_path, passed=True, engine="fused")
    assert choose_engine("auto", files, GPU) == "onnxruntime"
    (warning,) = warnings(caplog)
    assert warning == (
        f"{tmp_path} was verified with the engine fused, which can't run here: {reason}. "
        "onnxruntime takes its place, slower"
    )
    with pytest.raises(AccelError) as error:
        validate._check_static(runtime_preset("cuda-fused"), True)
    assert str(error.value) == f"runtime.engine=fused: {reason}. Take runtime.engine=onnxruntime"
    for preset in ("cuda-graph", "cuda"):
        validate._check_static(runtime_preset(preset), True)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_gpus_that_can_run_the_kernel(capability: tuple[int, int], device: Device, tmp_path: Path) -> None:
    device.capability = capability
    assert choose_engine("auto", deployable(tmp_path, passed=True, engine="fused"), GPU) == "fused"
    validate._check_static(runtime_preset("cuda-fused"), True)


@pytest.mark.parametrize(
    ("requested", "capability", "on", "dtype", "expected"),
    [
        ("auto", (9, 0), GPU, "float16", ["fused", "onnxruntime"]),
        ("auto", (9, 0), GPU, "float32", ["onnxruntime"]),  # the kernel can't run it, and would only warn
        ("auto", (7, 5), GPU, "float16", ["onnxruntime"]),
        ("auto", (9, 0), CPU, "float16", ["onnxruntime"]),
        ("onnxruntime", (9, 0), GPU, "float16", ["onnxruntime"]),
        ("fused", (9, 0), GPU, "float32", ["fused"]),
    ],
)
def test_engines_that_auto_is_verified_with(
    requested: str, capability: tuple[int, int], on: torch.device, dtype: str, expected: list[str], device: Device
) -> None:
    device.capability = capability
    assert engines_to_verify(requested, on, dtype) == expected


def test_the_cpu_has_no_kernel(device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_engine("auto", deployable(tmp_path, passed=True, engine="fused"), CPU) == "onnxruntime"
    assert "the kernel needs CUDA, not cpu" in warnings(caplog)[0]


def test_presets_of_gpus_take_what_is_verified() -> None:
    """None but the one that is named for it asks for the fused engine."""
    engines = {name: runtime_preset(name).engine for name in ("cpu", "cuda", "cuda-graph", "cuda-fused")}
    assert engines == {"cpu": "auto", "cuda": "auto", "cuda-graph": "auto", "cuda-fused": "fused"}


def test_a_preset_chosen_by_accel_falls_back(build: Build, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accel.load(folder)` of what was built for `cuda-fused` asks for `auto`; the preset by its name for `fused`."""
    folder = build(tiny, "merge")[1]["merge"].folder
    built = {"name": "cuda-fused", "device": "cuda", "engine": "fused"}
    monkeypatch.setattr(loading, "built_runtime", lambda files: built)
    monkeypatch.setattr(loading, "fastest", lambda: "cuda-graph")
    monkeypatch.setattr(loading, "check_provider", lambda provider: None)
    asked: list[str] = []

    def opened(folder: Path, runtime: object, dtype: str | None) -> object:
        asked.append(runtime.engine)  # type: ignore[attr-defined]
        return SimpleNamespace()

    monkeypatch.setattr(loading, "open_model", opened)
    accel.load(folder, check=False)
    accel.load(folder, engine="fused", check=False)
    accel.load(folder, "cuda-fused", check=False)
    accel.load(folder, "cuda-graph", check=False)
    assert asked == ["auto", "fused", "fused", "auto"]
