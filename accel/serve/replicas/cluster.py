"""Ray itself: a cluster of this machine's own, or another that exists."""

import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accel.config.serve import ServeConfig
from accel.errors import AccelError

AUTO = "auto"  # the Ray that was started on this machine
CONNECT_S = 10.0
OBJECT_STORE = 512 * 2**20  # bytes of shared memory for bodies; Ray would take 30% of the machine's memory
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}  # no reports to Ray's makers
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # all of Ray's processes listen on 127.0.0.1


def import_ray(address: str | None) -> None:
    """Import Ray Serve, which reads its environment variables as it is imported, and hands them on to its processes.

    A Ray of this machine's own listens on 127.0.0.1 and takes calls with a token only, as other users of the machine
    could otherwise run code in it: https://docs.ray.io/en/latest/ray-security/token-auth.html. Variables that are set
    already stay what they are.

    Args:
        address: Address of the cluster to join; None: Ray is to be started on this machine.

    Raises:
        AccelError: A package is missing.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in (QUIET if address is not None else QUIET | LOOPBACK | token).items():
        os.environ.setdefault(name, value)
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        raise AccelError(f"serve.executor=ray needs the package {missing}: pip install 'accel-onnx[ray]'") from error


def check_address(address: str | None) -> None:
    """Check that something answers at the address of a cluster: Ray itself would try for many minutes.

    Args:
        address: `HOST:PORT`; `auto` and None, a Ray on this machine, are not checked.

    Raises:
        AccelError: It is no such address, or nothing answers.
    """
    if address in (None, AUTO):
        return
    host, _, port = str(address).rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise AccelError(f"serve.ray_address={address}: must be HOST:PORT of a Ray cluster, or {AUTO}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise AccelError(
            f"serve.ray_address={address}: no cluster answers: {error}; leave it out to start Ray on this machine"
        ) from error


@contextmanager
def ray_cluster(config: ServeConfig, cpus: int, gpus: int) -> Iterator[Path | None]:
    """Start Ray on this machine, or join a cluster, for the duration of the context.

    Yields:
        Folder of the Ray that was started, which no other user can open; None for a cluster that was joined.

    Args:
        config: Section `serve` of the configuration.
        cpus: CPUs of this machine that replicas may reserve.
        gpus: Its GPUs.

    Raises:
        AccelError: Ray can't be started, or there is no cluster at the address.
    """
    import_ray(config.ray_address)
    import ray

    options: dict[str, Any] = {}
    private = None
    with ExitStack() as stack:
        if config.ray_address is None:
            folder = tempfile.TemporaryDirectory(prefix="accel-ray-", ignore_cleanup_errors=True)
            private = Path(stack.enter_context(folder))
            options = {"_temp_dir": str(private), "num_cpus": cpus, "num_gpus": gpus}
            options |= {"include_dashboard": config.ray_dashboard, "object_store_memory": OBJECT_STORE}
        stack.callback(ray.shutdown)
        with _own_signal_handler():
            try:
                ray.init(config.ray_address or "local", logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
                raise AccelError(_failure(config.ray_address, error)) from error
        yield private


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Open a context after which SIGTERM is handled as before it: Ray installs a handler that ends the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _failure(address: str | None, error: Exception) -> str:
    """Return the message for a Ray that can't be reached or started."""
    reason = str(error).strip().partition("\n")[0]
    if address is None:
        return f"serve.executor=ray: Ray can't be started: {reason}"
    return f"serve.ray_address={address}: {reason}; leave it out to start Ray on this machine"
