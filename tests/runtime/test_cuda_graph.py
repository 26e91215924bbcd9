"""What is recorded once and replayed does what it did, and what can't be recorded goes on as it is."""

import pytest
import torch

from accel.runtime.cuda_graph import CudaGraphCallable, _reason
from accel.runtime.streams import on_shared_stream

CUDA = torch.device("cuda")


class Counter:
    """Adds a number to a sum, both tensors that stay, and counts how often it was called to do so."""

    def __init__(self, device: torch.device, asks: bool = False) -> None:
        self.number, self.sum = torch.ones(1000, device=device), torch.zeros(1000, device=device)
        self.calls, self.asks = 0, asks

    def __call__(self) -> None:
        self.calls += 1
        if self.asks:
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


@pytest.mark.gpu
def test_on_a_gpu_it_is_recorded_at_the_second_call() -> None:
    """Replays read what is there then: the number changes between them."""
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
def test_what_asks_the_device_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """One warning, and every call counts once all the same."""
    work = Counter(CUDA, asks=True)
    captured = CudaGraphCallable(work, CUDA, "a sum")
    with on_shared_stream(CUDA):
        for _ in range(4):
            captured()
        assert set(work.sum.tolist()) == {8.0}
    assert not captured.captured
    assert caplog.text.count("a sum is not captured") == 1


@pytest.mark.gpu
def test_recordings_that_come_and_go() -> None:
    """Memory of one that is gone may be another's: none reads what it left there."""
    with on_shared_stream(CUDA):
        for _ in range(5):
            first, second = Counter(CUDA), Counter(CUDA)
            both = [CudaGraphCallable(work, CUDA, "a sum") for work in (first, second)]
            for _ in range(4):
                for captured in both:
                    captured()
            assert set(first.sum.tolist()) == set(second.sum.tolist()) == {8.0}


def test_the_reason_names_the_node() -> None:
    said = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running NonZero node. "
        "Name:'experts.nonzero' Status Message: CUDA failure 900: operation not permitted when stream is capturing"
    )
    end = RuntimeError("the recording is invalid")
    end.__context__ = RuntimeError(said)
    found = "node experts.nonzero (NonZero): CUDA failure 900: operation not permitted when stream is capturing"
    assert _reason(end) == found
