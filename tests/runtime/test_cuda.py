"""Behaviour that needs a GPU: work ordered by the shared stream, and device memory that runs out."""

import gc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from accel.config.presets import runtime_preset
from accel.errors import DeviceMemoryError
from accel.runtime.device_memory import check_weights_fit
from accel.runtime.io_binding import BoundSession
from accel.runtime.providers import CUDA
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.streams import on_shared_stream, shared_stream
from tests.graph.text import parse

pytestmark = pytest.mark.gpu

REPEATS = 200
ELEMENTS = 1 << 20
LONG = 2_000_000  # clock cycles: about a millisecond
DOUBLE = "g (float[n] x) => (float[n] y) { y = Add(x, x) }"
# Not a Concat of as many inputs: ONNX Runtime 1.31 keeps pinned memory for one of more than 32 until its session goes,
# and then gives it back from a callback, in which CUDA ends the process (error 800).
MANY = "g (float[n] x) => (float[m] y) { times = Constant <value = int64[1] {64}> ()\n y = Tile (x, times) }"
DEVICE = torch.device("cuda")


def opened(folder: Path, text: str, **options: str) -> BoundSession:
    path = folder / "text.onnx"
    path.write_bytes(ir.to_proto(parse(text)).SerializeToString())
    return BoundSession(open_session(path, SessionSettings(CUDA, options)), DEVICE)


def race(session: BoundSession) -> int:
    """Count the runs that read an input before it was written, or whose output was read before it was written."""
    x = torch.zeros(ELEMENTS, device=DEVICE)
    wrong = 0
    for number in range(1, REPEATS + 1):
        torch.cuda._sleep(LONG)
        x.fill_(float(number))
        (y,) = session({"x": x}, ["y"])
        wrong += int((y != 2.0 * number).any())
    return wrong


def test_torch_and_onnx_runtime_share_a_stream(tmp_path: Path) -> None:
    """While decoding, torch uses the sessions' stream, so that neither runs ahead of the other."""
    session = opened(tmp_path, DOUBLE)
    with on_shared_stream(DEVICE):
        assert torch.cuda.current_stream() == shared_stream()
        assert race(session) == 0


def test_callers_on_another_stream_are_ordered(tmp_path: Path) -> None:
    """Calls from torch's default stream, or from a stream of the caller, are ordered as well."""
    session = opened(tmp_path, DOUBLE)
    assert race(session) == 0
    with torch.cuda.stream(torch.cuda.Stream()):
        assert race(session) == 0


def test_the_race_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check fails for a session with a stream of its own, so the tests above are sensitive."""
    monkeypatch.setattr("accel.runtime.session.stream_options", lambda provider: {})
    session = opened(tmp_path, DOUBLE)
    with on_shared_stream(DEVICE):
        assert race(session) > 0


# `length` is computed on the host and copied to the device.
FROM_HOST = """g (float[n] x, float[k] past) => (int64[m] y)
{
    shape = Shape (past)
    length = Squeeze (shape)
    ones = Cast <to: int = 7> (x)
    y = Add (ones, length)
}"""


def test_values_from_the_host_are_not_overwritten(tmp_path: Path) -> None:
    """Runs with different lengths, queued behind a long kernel, each read their own length."""
    session = opened(tmp_path, FROM_HOST)
    x, past = torch.ones(16, device=DEVICE), torch.zeros(REPEATS, device=DEVICE)
    for _ in range(2):  # allocate memory for all outputs beforehand: an allocation would synchronise
        kept = [session({"x": x, "past": past}, ["y"])[0] for _ in range(REPEATS)]
    del kept
    with on_shared_stream(DEVICE):
        torch.cuda._sleep(100 * LONG)
        found = [session({"x": x, "past": past[:length]}, ["y"])[0] for length in range(REPEATS)]
        assert [{int(y.min()), int(y.max())} for y in found] == [{length + 1} for length in range(REPEATS)]


def test_a_session_deleted_while_the_device_works(tmp_path: Path) -> None:
    """A session deleted right after a run that is still queued: the process goes on, the output is correct."""
    for number in range(10):
        session = opened(tmp_path, FROM_HOST)
        x, past = torch.ones(16, device=DEVICE), torch.zeros(7, device=DEVICE)
        with on_shared_stream(DEVICE):
            torch.cuda._sleep(20 * LONG)
            (y,) = session({"x": x, "past": past[: number % 7]}, ["y"])
            del session
            gc.collect()
            assert int(y.max()) == number % 7 + 1


def test_a_session_deleted_right_after_a_run(tmp_path: Path) -> None:
    """Runs on host arrays wait for their outputs, as in calibration, but still leave a callback queued."""
    path = tmp_path / "text.onnx"
    path.write_bytes(ir.to_proto(parse(FROM_HOST)).SerializeToString())
    for length in range(1, 101):
        session = open_session(path, SessionSettings(CUDA))
        (y,) = session.run(None, {"x": np.ones(16, np.float32), "past": np.ones(length, np.float32)})
        del session
        assert y.max() == length + 1


NORM = """g (float16[b, n, 1024] x, float16[b, n, 1024] residual) => (float16[b, n, 1024] y)
{ y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon: float = 1e-6> (x, residual, weight) }"""


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_norms_accumulate_in_fp32(tmp_path: Path, scale: float) -> None:
    """Values within FP16 whose mean square is outside, at both ends of its range."""
    path = tmp_path / "norm.onnx"
    path.write_bytes(ir.to_proto(parse(NORM, {"weight": np.ones(1024, np.float16)})).SerializeToString())
    session = BoundSession(open_session(path, SessionSettings.of(runtime_preset("cuda"))), DEVICE)
    generator = torch.Generator().manual_seed(0)
    x, residual = (scale * torch.randn(2, 3, 1024, generator=generator).half() for _ in range(2))
    (y,) = session({"x": x, "residual": residual}, ["y"])
    total = (x + residual).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("limit", [True, False], ids=["memory limit", "whole device"])
def test_out_of_memory_leaves_the_session_usable(tmp_path: Path, limit: bool) -> None:
    """The message has sizes and advice; the next, smaller run is correct."""
    session = opened(tmp_path, MANY, **({"gpu_mem_limit": str(200 << 20)} if limit else {}))
    available = 200 << 20  # bytes
    taken = 0 if limit else torch.cuda.mem_get_info()[0] - available  # the output of `Tile` is limited to 4 GiB
    filled = torch.empty(max(0, taken), dtype=torch.uint8, device=DEVICE)
    elements = available // 4 // 8  # the output takes eight times the available memory
    (before,) = session({"x": torch.arange(1000.0)}, ["y"])
    with pytest.raises(DeviceMemoryError, match=r"out of memory: \d+ MB more were requested\. Reduce .*num_beams"):
        session({"x": torch.ones(elements, device=DEVICE)}, ["y"])
    del filled
    (after,) = session({"x": torch.arange(1000.0)}, ["y"])
    assert torch.equal(after, before)
    assert torch.equal(after.cpu(), torch.arange(1000.0).repeat(64))


def test_weights_too_large_for_the_gpu(tmp_path: Path) -> None:
    """Weights larger than free memory are refused before anything is loaded."""
    graph, data = tmp_path / "decoder.onnx", tmp_path / "decoder.onnx_data"
    graph.write_bytes(b"")
    with data.open("wb") as file:
        file.truncate(torch.cuda.mem_get_info()[1])  # a sparse file, which takes no disk space
    with pytest.raises(DeviceMemoryError, match=r"too small: the model has \d+ MB of weights"):
        check_weights_fit([graph], DEVICE)
    with data.open("wb") as file:
        file.truncate(1000)
    check_weights_fit([graph], DEVICE)
