"""The replicas, as the process that clients call sees them."""

import asyncio
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig
from starlette.types import Scope

from accel.config.schema import RuntimeConfig
from accel.config.serve import ServeConfig
from accel.errors import AccelError
from accel.serve.protocol import Status
from accel.serve.replicas.replica import Part, Replica
from accel.serve.replicas.resources import Resources
from accel.serve.requests.errors import not_ready
from accel.serve.requests.request_log import Record

NAME = "replica"  # of the deployment
LABELS = ("model", "replica")  # of a scheduler's metrics
ATTEMPTS = 2  # to construct a replica, before the server gives up
HEALTH_CHECK_S = 2.0  # how soon a replica that ended is replaced
ANSWER_S = 5.0  # for the state of a replica
EXCEPTION = re.compile(r"^(?:\w+\.)*\w+: (.+)$", re.MULTILINE)  # last line of a traceback
SPARE = 64  # requests of a replica beyond those for its models: lists of models, requests that it refuses


class Replicas:
    """The replicas of one server: an application of Ray Serve.

    Args:
        folders: Name -> folder of a deployable, which every machine of the cluster has.
        runtime: Runtime to open them with; None: the one that each was built for, or the fastest there.
        resources: What each replica needs.
        config: Section `serve` of the configuration.
        private: Folder of a Ray that was started for this server alone; None in a cluster.

    Attributes:
        models: The models as `/v1/models` lists them; empty before they are warm.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        runtime: RuntimeConfig | None,
        resources: Resources,
        config: ServeConfig,
        private: Path | None,
    ) -> None:
        self._config, self._resources = config, resources
        threads = runtime.threads if runtime is not None else 0
        options = {} if threads or resources.gpus else {"threads": resources.cpus}
        self._arguments = (dict(folders), runtime, options, config, private, int(time.time()))
        self._name = f"accel-{secrets.token_hex(4)}"  # a cluster may have several servers
        self._handle: Any = None  # whose attributes are the methods of `Replica`
        self._closing = threading.Event()
        self.models: list[dict[str, Any]] = []

    def warm_up(self) -> None:
        """Start the replicas, and wait until all are warm.

        Raises:
            AccelError: A replica can't be started.
        """
        logs = LoggingConfig(log_level=logging.ERROR, enable_access_log=False)
        controller_logs = LoggingConfig(log_level=logging.CRITICAL)  # errors of replicas, which are reported here
        try:
            serve.start(proxy_location="Disabled", logging_config=controller_logs)
            deployment: Any = serve.deployment(Replica, name=NAME, logging_config=logs, **self._options())
            handle: Any = serve.run(deployment.bind(*self._arguments), name=self._name, route_prefix=None)
            self.models = handle.describe.remote().result()
        except (RuntimeError, ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
            if self._closing.is_set():
                return
            raise AccelError(f"the replicas can't be started: {self._reason(error)}") from error
        self._handle = handle.options(stream=True)

    def _options(self) -> dict[str, Any]:
        """Return the options of the deployment: https://docs.ray.io/en/latest/serve/configure-serve-deployment.html."""
        config = self._config
        models = len(self._arguments[0])
        options: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": self._resources.cpus, "num_gpus": self._resources.gpus},
            # Each replica refuses by itself what its queues can't hold.
            "max_ongoing_requests": models * (config.max_rows + config.max_waiting) + SPARE,
            "max_queued_requests": config.max_waiting,  # while no replica is running
            "max_constructor_retry_count": ATTEMPTS,
            "health_check_period_s": HEALTH_CHECK_S,
            "graceful_shutdown_timeout_s": config.timeout_s,  # of a replica that is one too many
        }
        if config.max_replicas is None:
            return options | {"num_replicas": config.replicas}
        scaling = {
            "min_replicas": config.replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        }
        return options | {"autoscaling_config": scaling}

    async def is_ready(self) -> bool:
        """Return whether a replica is warm; at the start, whether all are."""
        return self._handle is not None and await asyncio.to_thread(self._running) > 0

    def _reason(self, error: Exception) -> str:
        """Return why a replica can't be started: the exception in it, or else what Ray Serve says."""
        application = serve.status().applications.get(self._name)
        message = application.deployments[NAME].message if application is not None else ""
        exceptions = EXCEPTION.findall(message)
        return exceptions[-1] if exceptions else str(error).strip()

    def _running(self) -> int:
        """Return the number of replicas that are warm."""
        application = serve.status().applications.get(self._name)
        states: Mapping[Any, int] = application.deployments[NAME].replica_states if application is not None else {}
        return states.get("RUNNING", 0)

    async def states(self) -> dict[tuple[str, ...], Status]:
        """Return the states of the schedulers of all replicas that answer, by the names of model and replica."""
        if self._handle is None:
            return {}
        try:
            answers = await self._handle.broadcast("states").results_async(timeout_s=ANSWER_S, return_exceptions=True)
        except TimeoutError:
            return {}
        return {key: status for states in answers if isinstance(states, dict) for key, status in states.items()}

    def answer(self, scope: Scope, body: bytes, record: Record) -> DeploymentResponseGenerator[Part]:
        """Have the replica with fewer requests, of two that Ray chooses at random, answer a request.

        Args:
            scope: Of the request: what can be sent to another process.
            body: Its body.
            record: Its record.

        Raises:
            ApiError: The replicas aren't warm yet.
        """
        if self._handle is None:
            raise not_ready()
        parts: DeploymentResponseGenerator[Part] = self._handle.answer.remote(scope, body, record)
        return parts

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Do nothing: Ray replaces replicas that end."""

    def close(self) -> None:
        """End the replicas."""
        self._closing.set()
        self._handle = None
        if self._config.ray_address is not None:  # Ray's own end would leave them running
            serve.delete(self._name)
