"""Whether launches of the kernel ended for want of a value that never came."""

import torch

FIRST = 2**31 - 1  # what a launch that gave up at the first operation of its list reports; one less for each later one


class Watchdog:
    """What launches report, for all kernels of a plan: see `Watch` in the kernel's source.

    Once a launch gave up, all waits of it end, and launches behind it return at once, until `gave_up` was asked.

    Args:
        device: Their device.

    Attributes:
        failed: On the device, int32 [1]: the earliest operation that gave up, counted down from `FIRST`; 0 if none did.
        error: The same in pinned memory of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.failed = torch.zeros(1, dtype=torch.int32, device=device)
        self.error = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._seen = self.error.numpy()  # the same memory: read at every step, without a tensor operation

    def gave_up(self) -> int | None:
        """Return the index of the operation that waited in vain in an earlier launch, once; None if none did.

        Synchronises with the device only in the first case. After it launches work again.
        """
        if not self._seen[0]:
            return None
        torch.cuda.synchronize(self.failed.device)  # of all operations that gave up the earliest was the first
        index = FIRST - int(self._seen[0])
        self.failed.zero_()
        self.error.zero_()
        torch.cuda.synchronize(self.failed.device)  # the next launch may be on another stream
        return index
