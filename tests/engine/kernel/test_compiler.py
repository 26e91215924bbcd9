"""What is compiled for a GPU is kept, and what is missing is named; NVRTC is replaced by a count of compilations."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from accel.engine.kernel import compiler, launch
from accel.engine.kernel.placement import NotRunnableError
from accel.engine.step import PlannedStep
from accel.errors import AccelError

SOURCE, SM_90 = "__global__ void decode() {}", "sm_90"
GPU = torch.device("cuda:1")


class Nvrtc(ModuleType):
    """Stands for `cupy.cuda.nvrtc`: "compiles" to the source in capitals."""

    class NVRTCError(RuntimeError):
        """As NVRTC's."""

    def __init__(self, version: tuple[int, int] = (12, 4)) -> None:
        super().__init__("cupy.cuda.nvrtc")
        self.version, self.compiled = version, list[tuple[str, ...]]()
        self._source = ""

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def getSupportedArchs(self) -> tuple[int, ...]:
        return (75, 80, 86, 89, 90)

    def createProgram(self, source: str, *_: Any) -> str:
        return source

    def destroyProgram(self, program: str) -> None:
        del program

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:
        if "bad" in program:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        self.compiled.append(options)

    def getCUBIN(self, program: str) -> bytes:
        return program.upper().encode()

    def getProgramLog(self, program: str) -> str:
        return f'note\nkernel.cu(1): error: identifier "{program}" is undefined\nend'


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Nvrtc:
    """The stand-in, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = Nvrtc()
    monkeypatch.setattr(compiler, "_nvrtc", lambda: found)
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    return found


def test_what_was_compiled_is_kept(nvrtc: Nvrtc, tmp_path: Path) -> None:
    """By its source, the architecture and NVRTC's version; nobody else can write the files."""
    first = compiler.compiled(SOURCE, SM_90)
    assert (first.data, first.kept) == (SOURCE.upper().encode(), False)
    assert first.path is not None
    assert first.path.parent == tmp_path / "accel" / "kernels"
    assert first.path.parent.stat().st_mode & 0o077 == 0
    assert nvrtc.compiled == [("--gpu-architecture=sm_90", "-std=c++17")]
    again = compiler.compiled(SOURCE, SM_90)
    assert (again.data, again.kept, again.path) == (first.data, True, first.path)
    compiler.compiled(SOURCE + " ", SM_90)
    compiler.compiled(SOURCE, "sm_89")
    nvrtc.version = (12, 6)
    compiler.compiled(SOURCE, SM_90)
    assert len(nvrtc.compiled) == 4
    assert len(list(first.path.parent.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"short", b"flipped"])
def test_damaged_files_are_compiled_again(nvrtc: Nvrtc, damage: bytes) -> None:
    path = compiler.compiled(SOURCE, SM_90).path
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?" if damage == b"flipped" else damage)
    assert not compiler.compiled(SOURCE, SM_90).kept
    assert path.read_bytes() == content
    assert compiler.compiled(SOURCE, SM_90).kept
    assert len(nvrtc.compiled) == 2


def test_the_cache_may_be_deleted_or_impossible(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = compiler.compiled(SOURCE, SM_90).path
    assert path is not None
    path.unlink()
    path.parent.rmdir()
    assert not compiler.compiled(SOURCE, SM_90).kept
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    found = compiler.compiled(SOURCE, SM_90)
    assert (found.data, found.path, found.kept) == (SOURCE.upper().encode(), None, False)


def test_several_compile_at_once(nvrtc: Nvrtc) -> None:
    """Whoever reads finds a whole file, and no temporary one is left."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: compiler.compiled(SOURCE, SM_90), range(64)))
    assert {each.data for each in found} == {SOURCE.upper().encode()}
    path = found[0].path
    assert path is not None
    assert list(path.parent.iterdir()) == [path]


def test_refused_source(nvrtc: Nvrtc) -> None:
    with pytest.raises(NotRunnableError, match=r'can\'t be compiled: kernel\.cu\(1\): error: identifier "bad"'):
        compiler.compiled("bad", SM_90)


def test_architectures(nvrtc: Nvrtc) -> None:
    """Code for an earlier capability runs on a later one of the same major number only."""
    capabilities = ((9, 0), (8, 9), (8, 7), (9, 1), (10, 0))
    assert [compiler.architecture_for(*each) for each in capabilities] == ["sm_90", "sm_89", "sm_86", "sm_90", None]


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compute capability of the GPU that there seems to be."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(found))
    launch.unsupported.cache_clear()
    yield found
    launch.unsupported.cache_clear()


def test_what_a_gpu_lacks(nvrtc: Nvrtc, capability: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named, and is an error of the engine."""

    def reason() -> str | None:
        launch.unsupported.cache_clear()
        return launch.unsupported(GPU)

    assert reason() is None
    capability[:] = [7, 5]
    assert reason() == "the device has compute capability 7.5, and the kernel needs 8.0"
    capability[:] = [10, 0]
    assert reason() == "the installed NVRTC can't compile for compute capability 10.0"
    capability[:] = [9, 0]
    nvrtc.version = (11, 8)
    assert reason() == "the kernel needs NVRTC of CUDA 12 or later, not 11.8"
    with pytest.raises(AccelError, match=r"^the kernel needs NVRTC of CUDA 12 or later, not 11\.8$"):
        PlannedStep(Path("decode.onnx"), GPU, {}, {})
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    assert reason() == "the kernel is compiled by CuPy, which is not installed"


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy raises several errors, in several lines."""

    class Missing(Nvrtc):
        def getVersion(self) -> tuple[int, int]:
            raise RuntimeError("no libnvrtc.so.12\nsecond line")

    package, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cuda.nvrtc = Missing()  # type: ignore[attr-defined]
    for name, module in {"cupy": package, "cupy.cuda": cuda}.items():
        monkeypatch.setitem(sys.modules, name, module)
    compiler._nvrtc.cache_clear()
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    assert compiler.missing() == "CuPy can't load NVRTC: no libnvrtc.so.12"
