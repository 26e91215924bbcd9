"""Whether it is over, asked of a device that never waits for the answer."""

import torch
from torch import Tensor

POLL_LAG = 3  # tokens that a GPU has queued while the host reads whether an earlier one was the last


class StopPoller:
    """Says whether a flag on the device was true some calls ago: at once on the CPU, `LAG` calls late on a GPU.

    What comes after the end is computed in vain, and at most so often; but the device always has something to do. It
    copies the flag on a stream of its own, for which the next token doesn't wait: once true, a flag stays true.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.poll_lag = device, poll_lag(device)
        self.calls = 0
        cuda = device.type == "cuda"
        self.flags = torch.zeros(self.poll_lag + 1, dtype=torch.bool, pin_memory=cuda)  # the newest calls', in turn
        self.copied = [torch.cuda.Event() for _ in range(self.poll_lag + 1)] if cuda else []
        self.stream = torch.cuda.Stream(device) if cuda else None

    def __call__(self, flag: Tensor) -> bool:
        newest, oldest = self.calls % len(self.flags), (self.calls + 1) % len(self.flags)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # of no stream on the CPU, where this does nothing
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
    """Calls by which a `Watch` is late."""
    return POLL_LAG if device.type == "cuda" else 0
