"""`stage=serve`: open deployables and answer HTTP requests until a signal ends it."""

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli import console, report
from accel.cli.compose import execute
from accel.config.schema import SERVE, Config, RuntimeConfig
from accel.config.serve import RAY, REPLICA_KEYS, ServeConfig
from accel.errors import AccelError
from accel.models.loading import find_variant

if TYPE_CHECKING:
    from fastapi import FastAPI

    from accel.serve.http.backend import Backend

ListModels = Callable[[], Sequence[Mapping[str, Any]]]  # as `/v1/models` does
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
    _check_executor(config, overrides)
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


def _check_executor(config: Config, overrides: Sequence[str]) -> None:
    """Raise `AccelError` where Ray can't start the replicas, or options of one executor are given with the other."""
    if config.serve.executor != RAY:
        for override in overrides:
            if override.partition("=")[0].removeprefix("serve.") in REPLICA_KEYS:
                raise AccelError(f"{override} is for replicas, which only serve.executor={RAY} has")
        return
    if config.serve.model_process is not None:
        raise AccelError(
            f"serve.model_process={str(config.serve.model_process).lower()} is not for serve.executor={RAY}, whose "
            "replicas are processes of their own"
        )
    if config.serve.max_replicas is not None and config.serve.max_replicas < config.serve.replicas:
        raise AccelError(
            f"serve.max_replicas={config.serve.max_replicas}: must be serve.replicas={config.serve.replicas} or more"
        )
    from accel.serve.replicas.cluster import check_address, import_ray
    from accel.serve.replicas.resources import resources_per_replica

    resources_per_replica(config.serve, _runtime(config, overrides))
    check_address(config.serve.ray_address)
    import_ray(config.serve.ray_address)


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
    from accel.serve.http.lifecycle import Server, listen

    with ExitStack() as stack:
        listener = stack.enter_context(listen(config.serve.host, config.serve.port))  # now, not after a long build
        artifacts = {} if config.serve.models else execute(config)
        report.finish(config, artifacts)
        folders = config.serve.models or {config.model.name: str(artifacts["verify"].folder)}
        open_backend = _open_replicas if config.serve.executor == RAY else _open_models
        key = _api_key(config.serve, overrides)
        app, backend, models = open_backend(stack, folders, _runtime(config, overrides), config.serve, key)
        _install_logs(config.serve)

        def announce() -> None:
            console.out.print(start_message(models(), _address(listener), config.serve, key is not None), markup=False)

        Server(app, backend, listener, config.serve, announce).run()
    console.err.print("stopped", style="dim")
    return {name: artifact.summary for name, artifact in artifacts.items()}


def _runtime(config: Config, overrides: Sequence[str]) -> RuntimeConfig | None:
    """Return the runtime to open the models with; None for the one that each was built for, or the fastest here."""
    chosen = not config.serve.models or any(override.startswith("runtime") for override in overrides)
    return config.runtime if chosen else None


def _open_models(
    stack: ExitStack, folders: Mapping[str, str], runtime: RuntimeConfig | None, config: ServeConfig, key: str | None
) -> tuple["FastAPI", "Backend", ListModels]:
    """Open models, in this process or in one that this one starts.

    Args:
        stack: Closes them at its end.
        folders: Name -> folder of a deployable.
        runtime: See `_runtime`.
        config: Section `serve` of the configuration.
        key: API key that clients must send.

    Returns:
        The application, what computes its replies, and a function that lists the models as `/v1/models` does.
    """
    from accel.serve.http.app import create_app
    from accel.serve.http.model_list import describe
    from accel.serve.http.service import Service
    from accel.serve.remote.model_process import ModelProcess
    from accel.serve.requests.served_model import open_served, scheduler_limits
    from accel.serve.scheduling.opening import open_scheduler

    process = ModelProcess(folders, runtime, config) if _has_model_process(config, runtime) else None
    if process is None:
        scheduler = partial(open_scheduler, limits=scheduler_limits(config))
        models = []
        for name, folder in folders.items():
            models.append(open_served(name, Path(folder), runtime, scheduler))
            stack.callback(models[-1].close)
    else:
        stack.callback(process.close)
        models = process.models
    service = Service(models, config, process)
    return create_app(service, config, key), service, lambda: [describe(served) for served in models]


def _has_model_process(config: ServeConfig, runtime: RuntimeConfig | None) -> bool:
    """Return whether models are opened in a process of their own."""
    from accel.runtime.providers import fastest

    if config.model_process is not None:
        return config.model_process
    return (fastest() if runtime is None else runtime.device) != "cpu"


def _open_replicas(
    stack: ExitStack, folders: Mapping[str, str], runtime: RuntimeConfig | None, config: ServeConfig, key: str | None
) -> tuple["FastAPI", "Backend", ListModels]:
    """Start or join Ray, for replicas that open the models. Arguments and result are those of `_open_models`."""
    import torch

    from accel.serve.replicas.cluster import ray_cluster
    from accel.serve.replicas.resources import cores, resources_per_replica

    needed = resources_per_replica(config, runtime)
    console.err.print(f"starting {config.replicas} replica{'s' * (config.replicas > 1)} …", style="dim", markup=False)
    private = stack.enter_context(ray_cluster(config, cores(), torch.cuda.device_count()))
    from accel.serve.replicas.deployment import Replicas
    from accel.serve.replicas.front import create_front

    absolute = {name: str(Path(folder).absolute()) for name, folder in folders.items()}
    replicas = Replicas(absolute, runtime, needed, config, private)
    return create_front(replicas, config, key), replicas, lambda: replicas.models


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


def _address(listener: socket.socket) -> str:
    """Return the address that a client on this machine calls, with scheme and port."""
    host, port = listener.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def start_message(models: Sequence[Mapping[str, Any]], address: str, config: ServeConfig, key_needed: bool) -> str:
    """Return what is printed once the server is ready.

    Args:
        models: The models as `/v1/models` lists them.
        address: Address of the server, with scheme and port.
        config: Section `serve` of the configuration.
        key_needed: Clients must send an API key.
    """
    variable = config.api_key_variable
    key = f"needed: the value of {variable}" if key_needed else f"none; set {variable} to ask clients for one"
    lines = [f"serving on {address} (Ctrl-C stops)"]
    lines += [f"  model    {model['id']}: {_description(model['accel'])}" for model in models]
    if config.executor == RAY:
        most = f" to {config.max_replicas}" if config.max_replicas is not None else ""
        where = "on this machine" if config.ray_address is None else f"in the cluster at {config.ray_address}"
        lines.append(f"  replicas {config.replicas}{most}, by Ray {where}")
    lines.append(f"  page     {address}/")
    lines.append(f"  API key  {key}")
    lines.append(f"  try      {_command(models[0], address, variable if key_needed else None)}")
    return "\n".join(lines)


def _description(model: Mapping[str, Any]) -> str:
    """Return in words what a model takes and how it was verified."""
    verified = model["verification"]
    if verified is None:
        return f"{model['kind']}, unverified"
    return f"{model['kind']}, {verified['precision']}, verified {verified['how']}"


def _command(model: Mapping[str, Any], address: str, variable: str | None) -> str:
    """Return a command that asks a model.

    Args:
        model: The model as `/v1/models` lists it.
        address: Address of the server.
        variable: Environment variable of the API key; None where none is needed.
    """
    key = f' -H "Authorization: Bearer ${variable}"' if variable is not None else ""
    name, kind = model["id"], model["accel"]["kind"]
    if kind == "speech":
        return f"curl {address}/v1/audio/transcriptions{key} -F model={name} -F file=@speech.wav"
    route, body = "/v1/completions", dict[str, Any](model=name, prompt="photosynthesis")
    if kind == "chat":
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        route, body = "/v1/chat/completions", {"model": name, "messages": messages}
    return f"curl {address}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
