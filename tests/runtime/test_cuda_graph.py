"""Captured work gives the same results when it is replayed, and work that can't be captured still runs."""

import re

import pytest
import torch

from accel.runtime.cuda_graph import CudaGraphCallable, _failure_reason
from accel.runtime.streams import on_shared_stream

CUDA = torch.device("cuda")


class Counter:
    """Callable that adds a number to a sum, both tensors at constant addresses, and counts its calls."""

    def __init__(self, device: torch.device, synchronizes: bool = False) -> None:
        self.number, self.sum = torch.ones(1000, device=device), torch.zeros(1000, device=device)
        self.calls, self.synchronizes = 0, synchronizes

    def __call__(self) -> None:
        self.calls += 1
        if self.synchronizes:
            self.sum.max().item()
        self.sum += self.number * 2


def test_on_the_cpu_it_is_called() -> None:
    work = Counter(torch.device("cpu"))
    captured = CudaGraphCallable(work, torch.device("cpu"), "a sum")
    for _ in range(4):
        captured()
    assert work.calls == 4
    assert set(work.sum.tolist()) == {8.0}
    assert not captured.captured


def test_a_capture_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with what was captured and its time: on the console, or as a record where nothing displays progress."""

    class Graph:
        """Stands for a CUDA graph, and calls nothing."""

        replays = 0

        def capture_begin(self, capture_error_mode: str) -> None:
            pass

        def capture_end(self) -> None:
            pass

        def replay(self) -> None:
            Graph.replays += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    captured = CudaGraphCallable(lambda: None, CUDA, "the decode graph for batch size 2 and bucket 64")
    with caplog.at_level("INFO", "accel.progress"):
        for _ in range(4):
            captured()
    assert Graph.replays == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"captured the decode graph for batch size 2 and bucket 64 in \d+\.\d\d s", message)


@pytest.mark.gpu
def test_on_a_gpu_the_second_call_is_captured() -> None:
    """Replays read the current values of the tensors: the number changes between them."""
    work = Counter(CUDA)
    captured = CudaGraphCallable(work, CUDA, "a sum")
    with on_shared_stream(CUDA):
        for number in (1, 10, 100, 1000):
            work.number.fill_(number)
            captured()
        assert work.calls == 2
        assert captured.captured
        assert set(work.sum.tolist()) == {2222.0}


@pytest.mark.gpu
def test_synchronizing_work_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    """One warning is logged, and every call still runs the function once."""
    work = Counter(CUDA, synchronizes=True)
    captured = CudaGraphCallable(work, CUDA, "a sum")
    with on_shared_stream(CUDA):
        for _ in range(4):
            captured()
        assert set(work.sum.tolist()) == {8.0}
    assert not captured.captured
    assert caplog.text.count("a sum is not captured") == 1


@pytest.mark.gpu
def test_random_numbers_after_a_failed_capture() -> None:
    """They are those that the seed gives: torch alone would raise an error."""
    torch.manual_seed(3)
    expected = torch.rand(4, device=CUDA)
    captured = CudaGraphCallable(Counter(CUDA, synchronizes=True), CUDA, "a sum")
    with on_shared_stream(CUDA):
        captured()
        captured()
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=CUDA), expected)


@pytest.mark.gpu
def test_graphs_created_and_destroyed() -> None:
    """Graphs that reuse the memory of destroyed ones give correct results."""
    with on_shared_stream(CUDA):
        for _ in range(5):
            first, second = Counter(CUDA), Counter(CUDA)
            both = [CudaGraphCallable(work, CUDA, "a sum") for work in (first, second)]
            for _ in range(4):
                for captured in both:
                    captured()
            assert set(first.sum.tolist()) == set(second.sum.tolist()) == {8.0}


def test_the_reason_names_the_node() -> None:
    message = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running NonZero node. "
        "Name:'experts.nonzero' Status Message: CUDA failure 900: operation not permitted when stream is capturing"
    )
    error = RuntimeError("the capture is invalid")
    error.__context__ = RuntimeError(message)
    expected = "node experts.nonzero (NonZero): CUDA failure 900: operation not permitted when stream is capturing"
    assert _failure_reason(error) == expected
