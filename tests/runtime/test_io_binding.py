"""Sessions called with torch tensors: no copies, no overwritten outputs, inputs of any layout and dtype."""

import gc
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from accel.runtime.dlpack import TensorExchange, run_with_cupy, run_with_dlpack
from accel.runtime.io_binding import BoundSession
from accel.runtime.providers import CPU, CUDA
from accel.runtime.session import SessionSettings, open_session
from tests.graph.text import parse

TEXT = """g (float[n, m] x, int64[k] ids, bool negate) => (float[n, m] y, float[k, m] rows, bool[n, m] positive)
{
    doubled = Add(x, x)
    y = If (negate) <
        then_branch = t () => (float[n, m] z) { z = Neg(doubled) },
        else_branch = e () => (float[n, m] z) { z = Identity(doubled) }
    >
    rows = Gather(x, ids)
    zero = Constant <value = float {0.0}> ()
    positive = Greater(x, zero)
}"""
ON, OFF = torch.tensor(True), torch.tensor(False)


def open_bound(folder: Path, device: str, exchange: TensorExchange) -> BoundSession:
    """Open a new session over `TEXT`."""
    path = folder / "text.onnx"
    path.write_bytes(ir.to_proto(parse(TEXT)).SerializeToString())
    settings = SessionSettings(CUDA if device == "cuda" else CPU)
    return BoundSession(open_session(path, settings), torch.device(device), exchange)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", run_with_dlpack), id="cpu-dlpack"),
        pytest.param(("cuda", run_with_dlpack), id="cuda-dlpack", marks=pytest.mark.gpu),
        pytest.param(("cuda", run_with_cupy), id="cuda-cupy", marks=pytest.mark.gpu),
    ],
)
def bound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BoundSession:
    """Open a session on every device with every tensor exchange."""
    return open_bound(tmp_path_factory.mktemp("text"), *request.param)


class Recording:
    """Session wrapper that records the addresses of the outputs of its last run."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.pointers: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any, *more: Any) -> None:
        self.session.run_with_iobinding(binding, *more)
        self.pointers = [value.data_ptr() for value in binding.get_outputs()]

    def run_with_ortvaluevector(self, *arguments: Any) -> None:
        self.session.run_with_ortvaluevector(*arguments)
        outputs = arguments[4]
        self.pointers = [value.data_ptr() for value in outputs]


def numbers(bound: BoundSession, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(bound.device)


def inputs(x: torch.Tensor, negate: torch.Tensor = OFF) -> dict[str, torch.Tensor]:
    return {"x": x, "ids": torch.tensor([1, 0]), "negate": negate}


def test_outputs_are_onnx_runtimes_own_memory(bound: BoundSession) -> None:
    """Each tensor has the address that ONNX Runtime gave the output: nothing is copied."""
    recording = Recording(bound.session)
    subject = BoundSession(recording, bound.device, bound.tensor_exchange)  # type: ignore[arg-type]
    outputs = subject(inputs(numbers(bound, 3, 5)), ["y", "rows"])
    assert [output.data_ptr() for output in outputs] == recording.pointers
    assert len(set(recording.pointers)) == 2


def test_numbers_order_and_types(bound: BoundSession) -> None:
    """Outputs come in the requested order, with the graph's shapes and dtypes."""
    x = numbers(bound, 3, 5)
    rows, y = bound(inputs(x), ["rows", "y"])
    assert torch.equal(y, 2 * x)
    assert torch.equal(rows, x[[1, 0]])
    (y,) = bound(inputs(x, ON), ["y"])
    assert torch.equal(y, -2 * x)
    assert bound.dtype("x") == bound.dtype("y") == torch.float32
    assert bound.dtype("ids") == torch.int64
    assert bound.dtype("negate") == torch.bool


def test_last_outputs_are_not_overwritten(bound: BoundSession) -> None:
    """Tensors of earlier runs keep their values and have memory of their own."""
    tensors = [numbers(bound, 3, 5) + number for number in range(20)]
    outputs = [bound(inputs(x), ["y", "rows"]) for x in tensors]
    for x, (y, rows) in zip(tensors, outputs, strict=True):
        assert torch.equal(y, 2 * x)
        assert torch.equal(rows, x[[1, 0]])
    assert len({tensor.data_ptr() for pair in outputs for tensor in pair}) == 40


def test_outputs_outlive_the_session(bound: BoundSession, tmp_path: Path) -> None:
    """A tensor keeps its memory after session and binding are deleted."""
    subject = open_bound(tmp_path, bound.device.type, bound.tensor_exchange)
    x = numbers(bound, 300, 500)
    y, rows = subject(inputs(x), ["y", "rows"])
    del subject
    gc.collect()
    churn = [torch.full((300, 500), float(number), device=bound.device) for number in range(20)]
    assert torch.equal(y, 2 * x)
    assert torch.equal(rows, x[[1, 0]])
    assert len(churn) == 20


def test_output_as_next_input(bound: BoundSession) -> None:
    """An output is the input of the next run, as a cache is, many times."""
    x = numbers(bound, 3, 5)
    y = x
    for _ in range(10):
        (y,) = bound(inputs(y), ["y"])
    assert torch.equal(y, 1024 * x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], dim=2)[:, :, 1],
        lambda x: x.expand(2, *x.shape)[1],
        lambda x: x.double(),
        lambda x: torch.cat([x, x])[3:],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["transposed", "strided", "expanded", "double", "offset", "with gradient"],
)
def test_any_tensor_is_an_input(bound: BoundSession, change: Any) -> None:
    """Memory layout, dtype and offset of an input make no difference."""
    x = numbers(bound, 3, 5)
    y, rows = bound(inputs(change(x)), ["y", "rows"])
    assert torch.equal(y, 2 * x)
    assert torch.equal(rows, x[[1, 0]])


def test_narrow_ids_and_numbers_for_flags(bound: BoundSession) -> None:
    """int32 ids are widened, a flag may be an integer, and names that the graph doesn't take are ignored."""
    x = numbers(bound, 3, 5)
    given = {"x": x, "ids": torch.tensor([2], dtype=torch.int32), "negate": torch.tensor(1), "unknown": x}
    y, rows = bound(given, ["y", "rows"])
    assert torch.equal(y, -2 * x)
    assert torch.equal(rows, x[[2]])


def test_missing_input_is_named(bound: BoundSession) -> None:
    """A session is not run if an input is missing."""
    with pytest.raises(KeyError, match="ids"):
        bound({"x": numbers(bound, 3, 5), "negate": OFF}, ["y"])


def test_empty_inputs_and_outputs(bound: BoundSession) -> None:
    """Inputs and outputs may have length 0, as caches without past do."""
    given = {"x": numbers(bound, 3, 0), "ids": torch.zeros(0, dtype=torch.int64), "negate": OFF}
    y, rows = bound(given, ["y", "rows"])
    assert y.shape == (3, 0)
    assert rows.shape == (0, 0)


def test_boolean_output(bound: BoundSession) -> None:
    """Boolean outputs are returned, though ONNX Runtime's DLPack has no bool type."""
    x = numbers(bound, 3, 5)
    (positive,) = bound(inputs(x), ["positive"])
    assert torch.equal(positive.bool(), x > 0)
