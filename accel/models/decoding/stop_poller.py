"""Polling of the stop flag without a host-device synchronisation."""

import torch
from torch import Tensor

POLL_LAG = 3  # calls between the copy of a flag on a GPU and its reading on the host: queued work for the GPU meanwhile


class StopPoller:
    """Callable that returns a boolean of the device, at once on the CPU and `POLL_LAG` calls late on a GPU.

    On a GPU, the loop therefore computes up to `POLL_LAG` tokens after the end, which are discarded; in exchange the
    device never idles while the host waits. The flag is copied on a stream of its own, for which the next token doesn't
    wait. It must stay true once it is true.

    Args:
        device: Device of the flag.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.poll_lag = device, poll_lag(device)
        self.calls = 0
        cuda = device.type == "cuda"
        # ring buffers over the latest calls: copies of the flag on the host, and events that mark them as complete
        self.flags = torch.zeros(self.poll_lag + 1, dtype=torch.bool, pin_memory=cuda)
        self.copied = [torch.cuda.Event() for _ in range(self.poll_lag + 1)] if cuda else []
        self.stream = torch.cuda.Stream(device) if cuda else None

    def __call__(self, flag: Tensor) -> bool:
        """Start the copy of `flag`, a boolean scalar, and return the one of `poll_lag` calls ago; False before."""
        if not self.poll_lag:
            return bool(flag)
        newest, oldest = self.calls % len(self.flags), (self.calls + 1) % len(self.flags)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # no effect on the CPU, where the stream is None
            self.flags[newest].copy_(flag, non_blocking=True)
        if self.copied:
            self.copied[newest].record(self.stream)
        self.calls += 1
        if self.calls <= self.poll_lag:
            return False
        if self.copied:
            self.copied[oldest].synchronize()
        return bool(self.flags[oldest])


def poll_lag(device: torch.device) -> int:
    """Return the number of calls by which a `StopPoller` is late on `device`."""
    return POLL_LAG if device.type == "cuda" else 0
