"""A process with all models of a server in it, for another one that answers HTTP."""

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from accel.config.schema import RuntimeConfig
from accel.config.serve import ServeConfig
from accel.data import texts
from accel.data.audio import load_extractor
from accel.errors import AccelError
from accel.models.loading import verification_of
from accel.serve.remote import messages
from accel.serve.remote.messages import Answer
from accel.serve.remote.remote_scheduler import ENDED, Link, RemoteScheduler
from accel.serve.remote.scheduler_server import SchedulerServer
from accel.serve.requests.served_model import ServedModel, open_served, scheduler_limits
from accel.serve.scheduling.opening import open_scheduler
from accel.system import remote_code
from accel.system.host_memory import return_large_blocks
from accel.system.quiet import quiet
from accel.system.signals import uninterrupted

logger = logging.getLogger(__name__)

END_S = 20.0  # for the process to end, before it is killed


@dataclass(frozen=True)
class RemoteModel:
    """What the process that answers HTTP has to know of a model in another one.

    Attributes:
        config: Its configuration.
        generation_config: Its default options.
        main_input_name: Name of its input.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig
    main_input_name: str

    def close(self) -> None:
        """Do nothing: the other process frees the model."""


class ModelProcess:
    """A process that opens deployables and decodes.

    Args:
        folders: Name -> folder of a deployable.
        runtime: Runtime to open them with; None: the one that each was built for, or the fastest here.
        config: Section `serve` of the configuration.

    Attributes:
        models: The models, as this process serves them.
        on_lost: Called with an error when the process has ended by itself.

    Raises:
        AccelError: A folder can't be opened.
    """

    def __init__(self, folders: Mapping[str, str], runtime: RuntimeConfig | None, config: ServeConfig) -> None:
        context = get_context("spawn")  # a forked process can't use a GPU that this one has looked at
        ours, theirs = context.Pipe()
        arguments = (theirs, dict(folders), runtime, config, remote_code.is_allowed())
        self._process = context.Process(target=_run, args=arguments, name="accel-models", daemon=True)
        with uninterrupted():
            self._process.start()
        theirs.close()  # so that its end is noticed here
        self.on_lost: Callable[[Exception], None] = lambda error: logger.error("%s", error)
        try:
            opened = _opened(ours)
            self._link = Link(ours, lambda error: self.on_lost(error))
            self.models = [self._served(name, Path(folder), opened[name]) for name, folder in folders.items()]
        except BaseException:
            self._process.kill()
            raise

    def _served(self, name: str, folder: Path, model: RemoteModel) -> ServedModel:
        """Return a model as this process serves it."""
        tokenizer = texts.load_tokenizer(folder)
        if tokenizer is None:  # never: the other process has it
            raise AccelError(f"{folder} holds no tokenizer")
        tokenizer("")  # drops padding and truncation that tokenizer.json may set
        extractor = load_extractor(folder) if model.main_input_name == "input_features" else None
        scheduler = RemoteScheduler(self._link, name)
        return ServedModel(name, model, scheduler, tokenizer, extractor, verification_of(folder))

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._link.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _opened(connection: Connection) -> dict[str, RemoteModel]:
    """Wait until the process has opened its models, and return what it says of them."""
    try:
        answer: Answer = messages.receive(connection)
    except (EOFError, OSError) as error:
        raise AccelError(f"{ENDED} while it opened the models, perhaps killed for lack of memory") from error
    if answer.error is not None:
        raise answer.error
    opened: dict[str, RemoteModel] = answer.result
    return opened


def _run(
    connection: Connection,
    folders: Mapping[str, str],
    runtime: RuntimeConfig | None,
    config: ServeConfig,
    allow_remote_code: bool,
) -> None:
    """Open models and decode until the other process asks for the end, or ends."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the other process gets them too, and decides when this one ends
    remote_code.set_for_process(allow_remote_code)
    quiet()
    return_large_blocks()
    scheduler = partial(open_scheduler, limits=scheduler_limits(config))
    with ExitStack() as stack:
        models: dict[str, Any] = {}
        try:
            for name, folder in folders.items():
                models[name] = open_served(name, Path(folder), runtime, scheduler)
                stack.callback(models[name].close)
            facts = {
                name: RemoteModel(each.model.config, each.model.generation_config, each.model.main_input_name)
                for name, each in models.items()
            }
            messages.send(connection, Answer(facts))
        except Exception as error:  # the other process raises it
            messages.send(connection, Answer(error=messages.sendable(error)))
            return
        SchedulerServer(models, connection).run()
