"""`stage=serve`: open deployables and answer HTTP requests until a signal ends it."""

import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli import console, report
from accel.cli.compose import execute
from accel.config.schema import SERVE, Config
from accel.config.serve import ServeConfig
from accel.errors import AccelError
from accel.models.loading import find_variant

if TYPE_CHECKING:
    from accel.serve.requests.served_model import ServedModel

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # what a client on this machine calls instead


def check(config: Config, overrides: Sequence[str]) -> None:
    """Check what can be checked before a model is built.

    Args:
        config: Configuration.
        overrides: Overrides on the command line.

    Raises:
        AccelError: A package is missing, a folder isn't a deployable, or options exclude each other.
    """
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise AccelError(f"stage=serve needs the package {error.name}: pip install 'accel-onnx[serve]'") from error
    _api_key(config.serve, overrides)
    if not config.serve.models:
        return
    built = [override for override in overrides if override.split("=")[0].split(".")[0] == "model"]
    if built:
        raise AccelError(f"serve.models names what to serve, and {built[0]} builds a model: leave out one of the two")
    if config.stage not in (SERVE, [SERVE]):
        raise AccelError(f"stage={config.stage} builds a model, and serve.models names others: use stage=serve")
    for name, folder in config.serve.models.items():
        if not Path(folder).is_dir():
            raise AccelError(f"serve.models.{name}={folder}: no such folder")
        try:
            find_variant(Path(folder))
        except AccelError as error:
            raise AccelError(f"serve.models.{name}={folder}: {error}") from error


def _api_key(config: ServeConfig, overrides: Sequence[str]) -> str | None:
    """Return the API key; None where clients need none."""
    key = os.environ.get(config.api_key_variable) or None
    asked_for = any(override.startswith("serve.api_key_variable=") for override in overrides)
    if key is None and asked_for:
        raise AccelError(
            f"serve.api_key_variable={config.api_key_variable}: the environment has no such variable, or it is empty"
        )
    return key


def run(config: Config, overrides: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Build what is to be built, then serve until Ctrl-C or SIGTERM.

    Args:
        config: Configuration.
        overrides: Overrides on the command line. Where one is about the runtime, it holds for `serve.models` too.

    Returns:
        Stage -> summary of its artifact, for the stages that were asked for.

    Raises:
        AccelError: The address is taken, a package is missing, or a folder can't be opened.
    """
    check(config, overrides)
    from accel.serve.http.app import create_app
    from accel.serve.http.lifecycle import Server, listen
    from accel.serve.http.service import Service
    from accel.serve.requests.served_model import open_served, scheduler_limits
    from accel.serve.scheduling.opening import open_scheduler

    with ExitStack() as stack:
        listener = stack.enter_context(listen(config.serve.host, config.serve.port))  # now, not after a long build
        artifacts = {} if config.serve.models else execute(config)
        report.finish(config, artifacts)
        folders = config.serve.models or {config.model.name: str(artifacts["verify"].folder)}
        chosen = not config.serve.models or any(override.startswith("runtime") for override in overrides)
        models = []
        for name, folder in folders.items():
            served = open_served(
                name,
                Path(folder),
                config.runtime if chosen else None,
                partial(open_scheduler, limits=scheduler_limits(config.serve)),
            )
            stack.callback(served.close)
            models.append(served)
        service, key = Service(models, config.serve), _api_key(config.serve, overrides)
        _install_logs(config.serve)
        ready = partial(_announce, models, listener, config.serve, key is not None)
        Server(create_app(service, config.serve, key), service, listener, config.serve, ready).run()
    console.err.print("stopped", style="dim")
    return {name: artifact.summary for name, artifact in artifacts.items()}


class _Lines(logging.Handler):
    """Log handler that writes the message of each record, one line of JSON, to standard error as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        console.err.file.write(f"{record.getMessage()}\n")
        console.err.file.flush()


def _install_logs(config: ServeConfig) -> None:
    """Write requests as JSON, if the configuration says so, and errors of uvicorn as accel's own."""
    from accel.serve.requests.request_log import LOGGER

    requests = logging.getLogger(LOGGER)
    requests.handlers, requests.propagate = [_Lines()] if config.log_requests else [], False
    requests.setLevel(logging.INFO if config.log_requests else logging.CRITICAL)
    faults = logging.getLogger("uvicorn.error")
    faults.handlers, faults.propagate = [console.LogHandler()], False
    faults.setLevel(logging.ERROR)  # its warnings are about what clients send


def _announce(models: Sequence["ServedModel"], listener: socket.socket, config: ServeConfig, key_needed: bool) -> None:
    """Print where the server is, what it serves, and a command to try."""
    host, port = listener.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.out.print(start_message(models, address, config, key_needed), markup=False)


def start_message(models: Sequence["ServedModel"], address: str, config: ServeConfig, key_needed: bool) -> str:
    """Return what is printed once the server is ready.

    Args:
        models: The models.
        address: Address of the server, with scheme and port.
        config: Section `serve` of the configuration.
        key_needed: Clients must send an API key.
    """
    variable = config.api_key_variable
    key = f"needed: the value of {variable}" if key_needed else f"none; set {variable} to ask clients for one"
    return "\n".join(
        (
            f"serving on {address} (Ctrl-C stops)",
            *(f"  model    {served.name}: {_description(served)}" for served in models),
            f"  page     {address}/",
            f"  API key  {key}",
            f"  try      {_command(models[0], address, variable if key_needed else None)}",
        )
    )


def _description(served: "ServedModel") -> str:
    """Return in words what a model takes and how it was verified."""
    from accel.serve.http.information import figures

    if served.verification is None:
        return f"{served.kind}, unverified"
    verified = figures(served.verification)
    return f"{served.kind}, {verified['precision']}, verified {verified['how']}"


def _command(served: "ServedModel", address: str, variable: str | None) -> str:
    """Return a command that asks a model.

    Args:
        served: The model.
        address: Address of the server.
        variable: Environment variable of the API key; None where none is needed.
    """
    key = f' -H "Authorization: Bearer ${variable}"' if variable is not None else ""
    if served.kind == "speech":
        return f"curl {address}/v1/audio/transcriptions{key} -F model={served.name} -F file=@speech.wav"
    route, body = "/v1/completions", dict[str, Any](model=served.name, prompt="photosynthesis")
    if served.kind == "chat":
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        route, body = "/v1/chat/completions", {"model": served.name, "messages": messages}
    return f"curl {address}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
