"""A server as worker processes run it: the model object, its offline rate, and HTTP, in the same process or another."""

import os
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import torch

from accel.config.serve import ServeConfig
from accel.data.texts import load_tokenizer
from accel.models import arguments
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.serve.http.app import create_app
from accel.serve.http.lifecycle import Server, listen
from accel.serve.http.service import Service
from accel.serve.remote.model_process import RemoteModel
from accel.serve.remote.remote_scheduler import Link, RemoteScheduler
from accel.serve.remote.scheduler_server import SchedulerServer
from accel.serve.requests.served_model import ServedModel, scheduler_limits
from accel.serve.scheduling.opening import open_scheduler
from scripts.peers.checkpoint import word_tokenizer
from scripts.serve_load.workload import random_work


@dataclass(frozen=True)
class Opened:
    """What the parent knows of a server.

    Attributes:
        port: Its port.
        vocabulary: Ids that a prompt may have.
        description: Scheduler, engine and device, in words.
    """

    port: int
    vocabulary: int
    description: str


@dataclass(frozen=True)
class Schedulers:
    """What a process that answers HTTP has to know of the one that decodes.

    Attributes:
        address: Address that it listens on.
        model: What it says of the model.
        vocabulary: As in `Opened`.
        description: Likewise.
    """

    address: Any
    model: RemoteModel
    vocabulary: int
    description: str


@dataclass
class _Process:
    """What runs in this process."""

    model: AcceleratedModel | RemoteModel
    link: Link | None = None
    server: Server | None = None
    thread: threading.Thread | None = None
    failure: BaseException | None = None


NAME = "model"  # that the clients call it by
AUTHKEY = b"serve_load"  # both processes belong to this user
_processes: list[_Process] = []  # at most one, since functions that a parent calls have no object in common


def open_model(folder: Path, runtime: str, device: str | None) -> None:
    """Load a deployable, whose sequences then never end before their largest number of tokens.

    Args:
        folder: The deployable.
        runtime: Preset; see `accel.load`.
        device: Number of the GPU that this process sees; None for all.

    Raises:
        AccelError: As `accel.load`.
    """
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # read at the first use of CUDA
    model = load(folder, runtime, static=True)
    model.generation_config.eos_token_id = None
    _processes.append(_Process(model))


def offline_rates(rows: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
    """Return new tokens a second of `generate` over one batch, the best that this model object does.

    Args:
        rows: Sequences of the batch.
        prompt_tokens: Tokens of each prompt.
        new_tokens: New tokens of each sequence.
        repeats: Timed calls, behind two that aren't.
    """
    model: Any = _processes[0].model
    work = random_work(rows, _vocabulary(model), [prompt_tokens] * 2, [new_tokens] * 2)
    ids = torch.tensor([each.prompt for each in work], device=model.device)
    rates = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens
        )
        output.cpu()  # waits for the device
        rates.append(rows * new_tokens / (time.perf_counter() - start))
    return rates[2:]


def usual_processes() -> int:
    """Return the number of processes that `stage=serve` has for this model: on a GPU, HTTP has one of its own."""
    model: Any = _processes[0].model
    return 2 if model.device.type == "cuda" else 1


def open_server(folder: Path, rows: int, most_waiting: int) -> Opened:
    """Serve the model that `open_model` loaded on a free port of this machine, and return once it is warm.

    Args:
        folder: The deployable.
        rows: Most sequences that are decoded at once.
        most_waiting: Most requests in the queue.

    Raises:
        AccelError: The model can't be warmed up.
    """
    process = _processes[0]
    served = _served(folder, rows, most_waiting)
    port = _serve(process, served, _limits(rows, most_waiting))
    return Opened(port, min(_vocabulary(process.model), len(served.tokenizer)), _description(served))


def open_schedulers(folder: Path, rows: int, most_waiting: int) -> Schedulers:
    """Let `open_http` in another process submit requests for the model that `open_model` loaded.

    Args:
        folder: As for `open_server`.
        rows: Likewise.
        most_waiting: Likewise.
    """
    process = _processes[0]
    served = _served(folder, rows, most_waiting)
    listener = Listener(authkey=AUTHKEY)

    def run() -> None:
        with listener, listener.accept() as connection:
            SchedulerServer({NAME: served}, connection).run()
        served.close()

    process.thread = threading.Thread(target=run, name="schedulers")
    process.thread.start()
    model = process.model
    facts = RemoteModel(model.config, model.generation_config, model.main_input_name)
    vocabulary = min(_vocabulary(model), len(served.tokenizer))
    return Schedulers(listener.address, facts, vocabulary, f"{_description(served)}, HTTP in a process of its own")


def open_http(schedulers: Schedulers, folder: Path, rows: int, most_waiting: int) -> Opened:
    """Answer HTTP for the model of another process. Arguments, result and errors are those of `open_server`."""
    link = Link(Client(schedulers.address, authkey=AUTHKEY), lambda error: None)
    tokenizer = load_tokenizer(folder) or word_tokenizer(_vocabulary(schedulers.model))
    served = ServedModel(NAME, schedulers.model, RemoteScheduler(link, NAME), tokenizer)
    process = _Process(schedulers.model, link=link)
    _processes.append(process)
    port = _serve(process, served, _limits(rows, most_waiting))
    return Opened(port, schedulers.vocabulary, schedulers.description)


def _limits(rows: int, most_waiting: int) -> ServeConfig:
    """Return the limits of the server."""
    return ServeConfig(port=0, log_requests=False, max_rows=rows, max_waiting=most_waiting, drain_s=1)


def _served(folder: Path, rows: int, most_waiting: int) -> ServedModel:
    """Return the model that `open_model` loaded with a scheduler."""
    model: Any = _processes[0].model
    tokenizer = load_tokenizer(folder) or word_tokenizer(_vocabulary(model))
    scheduler = open_scheduler(model, scheduler_limits(_limits(rows, most_waiting)))
    return ServedModel(NAME, model, scheduler, tokenizer)


def _serve(process: _Process, served: ServedModel, limits: ServeConfig) -> int:
    """Answer HTTP in a thread, and return its port once the model is warm."""
    service = Service([served], limits)
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    process.server = Server(create_app(service, limits), service, listener, limits, ready.set)
    port: int = listener.getsockname()[1]

    def serve(server: Server) -> None:
        try:
            server.run()
        except BaseException as error:  # raised again by the caller
            process.failure = error
            ready.set()

    process.thread = threading.Thread(target=serve, args=(process.server,), name="server")
    process.thread.start()
    ready.wait()
    if process.failure is not None:
        raise process.failure
    return port


def _description(served: ServedModel) -> str:
    """Return scheduler, engine and device in words."""
    model: Any = served.model
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{type(served.scheduler).__name__}, engine {model.runtime.engine}, {model.dtype}, {name}"


def close_server() -> None:
    """End the server and free the model. Where HTTP is in another process, that one is closed first."""
    process = _processes.pop()
    if process.server is not None:
        process.server.stop()
    if process.link is not None and process.thread is not None:
        process.thread.join()
        process.link.close()
    elif process.thread is not None:
        process.thread.join()  # which closes the model as well
    else:
        process.model.close()


def _vocabulary(model: Any) -> int:
    """Return the number of ids that a prompt and an output may have."""
    return min(arguments.vocabulary_sizes(model.config))
