"""What the server knows of whatever computes its replies: the models of this process, or replicas in others."""

from collections.abc import Callable, Mapping
from typing import Protocol

from accel.serve.protocol import Status


class Backend(Protocol):
    """What computes the replies. Implemented by `http.service.Service` and `replicas.deployment.Replicas`."""

    def warm_up(self) -> None:
        """Prepare everything that a first request would otherwise wait for.

        Raises:
            AccelError: That failed; libraries' own errors are raised as well.
        """

    async def is_ready(self) -> bool:
        """Return whether it can compute."""

    async def states(self) -> Mapping[tuple[str, ...], Status]:
        """Return the states of its schedulers, by the values of the labels that its metrics have."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Have `on_failure` called with an error, on any thread, once it can't compute any more by itself."""

    def close(self) -> None:
        """Free everything."""
