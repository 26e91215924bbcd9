"""A replica: a process with all models in it, and the application that answers requests about them."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import Message, Scope

from accel.config.schema import RuntimeConfig
from accel.config.serve import ServeConfig
from accel.serve.http.app import create_app
from accel.serve.http.middleware import RECORD
from accel.serve.http.model_list import describe
from accel.serve.http.service import Service
from accel.serve.protocol import Status
from accel.serve.replicas.private_socket import close_network_port
from accel.serve.requests.request_log import Record
from accel.serve.requests.served_model import open_served, scheduler_limits
from accel.serve.scheduling.opening import open_scheduler
from accel.system.host_memory import return_large_blocks
from accel.system.quiet import quiet

Part = tuple[list[Message], Record]


class Replica:
    """Deployment class of Ray Serve, which makes one object of it in each process, once its models are warm.

    Args:
        folders: Name -> folder of a deployable.
        runtime: Runtime to open them with; None: the one that each was built for, or the fastest here.
        options: Values that replace the runtime's, by the field names of `RuntimeConfig`.
        config: Section `serve` of the configuration.
        private: Folder that no other user can open, on the machine that Ray was started on for this server alone; None
            in a cluster.
        created: Time that clients are told the models were made at, in seconds since 1970: the same for all replicas.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        runtime: RuntimeConfig | None,
        options: Mapping[str, Any],
        config: ServeConfig,
        private: Path | None,
        created: int,
    ) -> None:
        if private is not None:
            close_network_port(private)
        quiet()
        return_large_blocks()
        scheduler = partial(open_scheduler, limits=scheduler_limits(config))
        served = [open_served(name, Path(folder), runtime, scheduler, **options) for name, folder in folders.items()]
        self._service = Service([replace(one, created=created) for one in served], config)
        self._service.warm_up()
        self._app = create_app(self._service, config)

    async def answer(self, scope: Scope, body: bytes, record: Record) -> AsyncIterator[Part]:
        """Yield the messages of a reply, as ASGI has them, as soon as there are some, and what the record says then.

        Args:
            scope: Of the request: what can be sent to another process.
            body: Body of the request.
            record: Record of the request.
        """
        record.started = time.monotonic()  # each machine has a clock of its own
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if request:
                return request.pop()
            await asyncio.Event().wait()  # a client that goes away cancels this method
            raise AssertionError

        async def run() -> None:
            try:
                await self._app({**scope, "state": {RECORD: record}}, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            over = False
            while not over:
                part = [await messages.get()]
                while not messages.empty():
                    part.append(messages.get_nowait())
                over = part[-1] is None
                yield [message for message in part if message is not None], record
            await task
        finally:
            task.cancel()

    async def describe(self) -> list[dict[str, Any]]:
        """Return the models as `/v1/models` lists them."""
        return [describe(served) for served in self._service.models.values()]

    async def states(self) -> dict[tuple[str, ...], Status]:
        """Return the states of the schedulers, by the names of the model and of this replica."""
        from ray import serve

        name = serve.get_replica_context().replica_id.unique_id
        return {(*key, name): status for key, status in (await self._service.states()).items()}
