"""What only a GPU can show: work in the right order without waiting, and a device that runs full."""

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
    """How often a run read its input before a long kernel had written it, or its output was read before it was."""
    x = torch.zeros(ELEMENTS, device=DEVICE)
    wrong = 0
    for number in range(1, REPEATS + 1):
        torch.cuda._sleep(LONG)
        x.fill_(float(number))
        (y,) = session({"x": x}, ["y"])
        wrong += int((y != 2.0 * number).any())
    return wrong


def test_torch_and_onnx_runtime_share_a_stream(tmp_path: Path) -> None:
    """While decoding, torch works on the sessions' stream: neither overtakes the other."""
    session = opened(tmp_path, DOUBLE)
    with on_shared_stream(DEVICE):
        assert torch.cuda.current_stream() == shared_stream()
        assert race(session) == 0


def test_callers_on_another_stream_wait_their_turn(tmp_path: Path) -> None:
    """A runtime called from torch's default stream, or from one of the caller's own, is in order as well."""
    session = opened(tmp_path, DOUBLE)
    assert race(session) == 0
    with torch.cuda.stream(torch.cuda.Stream()):
        assert race(session) == 0


def test_the_race_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test on a session with a stream of its own does read too early: the others can fail."""
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


def test_what_the_host_computed_is_not_overwritten(tmp_path: Path) -> None:
    """Runs are queued behind a long kernel, each with another length, and each is given its own."""
    session = opened(tmp_path, FROM_HOST)
    x, past = torch.ones(16, device=DEVICE), torch.zeros(REPEATS, device=DEVICE)
    for _ in range(2):  # room for all outputs: what is allocated anew would be waited for
        kept = [session({"x": x, "past": past}, ["y"])[0] for _ in range(REPEATS)]
    del kept
    with on_shared_stream(DEVICE):
        torch.cuda._sleep(100 * LONG)
        found = [session({"x": x, "past": past[:length]}, ["y"])[0] for length in range(REPEATS)]
        assert [{int(y.min()), int(y.max())} for y in found] == [{length + 1} for length in range(REPEATS)]


def test_a_session_may_go_while_the_device_works(tmp_path: Path) -> None:
    """Dropped right after a run that is still queued: the process goes on, and the output comes out right."""
    for number in range(10):
        session = opened(tmp_path, FROM_HOST)
        x, past = torch.ones(16, device=DEVICE), torch.zeros(7, device=DEVICE)
        with on_shared_stream(DEVICE):
            torch.cuda._sleep(20 * LONG)
            (y,) = session({"x": x, "past": past[: number % 7]}, ["y"])
            del session
            gc.collect()
            assert int(y.max()) == number % 7 + 1


def test_a_session_may_go_right_after_a_run(tmp_path: Path) -> None:
    """As the audit's do, which run on arrays of the host and wait for their outputs: something is queued even so."""
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
def test_norms_add_up_in_fp32(tmp_path: Path, scale: float) -> None:
    """Squares of numbers that FP16 holds, but whose mean square it does not, on either end of its range."""
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
def test_a_full_device_says_so_and_the_session_goes_on(tmp_path: Path, limit: bool) -> None:
    """One message with sizes and what to do; the next run, a smaller one, is right."""
    session = opened(tmp_path, MANY, **({"gpu_mem_limit": str(200 << 20)} if limit else {}))
    room = 200 << 20
    taken = 0 if limit else torch.cuda.mem_get_info()[0] - room  # `Tile` makes no more than 4 GiB
    filled = torch.empty(max(0, taken), dtype=torch.uint8, device=DEVICE)
    elements = room // 4 // 8  # eight times what there is
    (before,) = session({"x": torch.arange(1000.0)}, ["y"])
    with pytest.raises(DeviceMemoryError, match=r"no room for \d+ MB more.*fewer beams"):
        session({"x": torch.ones(elements, device=DEVICE)}, ["y"])
    del filled
    (after,) = session({"x": torch.arange(1000.0)}, ["y"])
    assert torch.equal(after, before)
    assert torch.equal(after.cpu(), torch.arange(1000.0).repeat(64))


def test_a_gpu_too_small_is_foretold(tmp_path: Path) -> None:
    """Weights that exceed what is free are refused before anything is loaded."""
    graph, data = tmp_path / "decoder.onnx", tmp_path / "decoder.onnx.data"
    graph.write_bytes(b"")
    with data.open("wb") as file:
        file.truncate(torch.cuda.mem_get_info()[1])  # a sparse file: it takes no room on the disk
    with pytest.raises(DeviceMemoryError, match=r"too small: the model has \d+ MB of weights"):
        check_weights_fit([graph], DEVICE)
    with data.open("wb") as file:
        file.truncate(1000)
    check_weights_fit([graph], DEVICE)
