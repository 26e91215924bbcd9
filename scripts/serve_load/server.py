"""A server in this process, as a worker process runs it: the model object, its offline rate, and its HTTP side."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from accel.config.serve import ServeConfig
from accel.data.texts import load_tokenizer
from accel.models import arguments
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.serve.http.app import create_app
from accel.serve.http.lifecycle import Server, listen
from accel.serve.http.service import Service
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


@dataclass
class _Process:
    """What runs in this process."""

    model: AcceleratedModel
    server: Server | None = None
    thread: threading.Thread | None = None
    failure: BaseException | None = None


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
    model = _processes[0].model
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
    limits = ServeConfig(port=0, log_requests=False, max_rows=rows, max_waiting=most_waiting, drain_s=1)
    tokenizer = load_tokenizer(folder) or word_tokenizer(_vocabulary(process.model))
    scheduler = open_scheduler(process.model, scheduler_limits(limits))
    service = Service([ServedModel("model", process.model, scheduler, tokenizer)], limits)
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    process.server = Server(create_app(service, limits), service, listener, limits, ready.set)
    port = listener.getsockname()[1]

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
    device = process.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    description = f"{type(scheduler).__name__}, engine {process.model.runtime.engine}, {process.model.dtype}, {name}"
    return Opened(port, min(_vocabulary(process.model), len(tokenizer)), description)


def close_server() -> None:
    """End the server and free the model."""
    process = _processes.pop()
    if process.server is not None and process.thread is not None:
        process.server.stop()
        process.thread.join()  # which closes the model as well
    else:
        process.model.close()


def _vocabulary(model: AcceleratedModel) -> int:
    """Return the number of ids that a prompt and an output may have."""
    return min(arguments.vocabulary_sizes(model.config))
