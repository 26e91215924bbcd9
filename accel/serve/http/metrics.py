"""Metrics in Prometheus' text format.

https://prometheus.io/docs/practices/naming/
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from accel.serve.protocol import Status
from accel.serve.requests.request_log import Record
from accel.serve.requests.served_model import ServedModel

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
# name, what it is, and its value; those that end in _total only grow
STATES = (
    ("accel_requests_waiting", "Requests in the queue", lambda status: status.waiting),
    ("accel_requests_running", "Requests that are being decoded: the batch size", lambda status: status.running),
    ("accel_batch_rows", "Rows of the running batch", lambda status: status.rows),
    ("accel_cache_used_tokens", "Tokens that the running rows hold", lambda status: status.cached_tokens),
    ("accel_cache_tokens", "Tokens that all rows can hold", lambda status: status.cache_tokens),
    ("accel_generated_tokens_total", "New tokens since the start", lambda status: status.generated_tokens),
)


class _Schedulers(Collector):
    """Reads the state of each model's scheduler at the moment of the scrape."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[Any]:
        """Yield one family of metrics for each of `STATES`."""
        states: dict[str, Status] = {served.name: served.scheduler.status() for served in self._models}
        for name, documentation, value in STATES:
            kind: Any = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, documentation, labels=["model"])
            for model, status in states.items():
                family.add_metric([model], value(status))
            yield family


class Metrics:
    """Metrics of one server.

    Args:
        models: The models that it serves.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Schedulers(models))
        self._requests = Counter(
            "accel_http_requests", "Requests", ["route", "model", "status"], registry=self._registry
        )
        self._duration = self._histogram("accel_request_duration_seconds", "Time of a request", SECONDS)
        self._first_token = self._histogram("accel_time_to_first_token_seconds", "Time to first token", SECONDS)
        self._per_token = self._histogram(
            "accel_time_per_output_token_seconds", "Time per output token of a sequence", TOKEN_SECONDS
        )
        self._prompt_tokens = Counter("accel_prompt_tokens", "Tokens of prompts", ["model"], registry=self._registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        """Return a new histogram by model."""
        return Histogram(name, documentation, ["model"], registry=self._registry, buckets=buckets)

    def add(self, record: Record) -> None:
        """Count a request that is over."""
        self._requests.labels(record.route, record.model, record.status).inc()
        if not record.sequences:
            return
        self._duration.labels(record.model).observe(time.monotonic() - record.started)
        self._prompt_tokens.labels(record.model).inc(record.prompt_tokens)
        if record.first_token_s is not None:
            self._first_token.labels(record.model).observe(record.first_token_s)
        for seconds in record.token_times:
            self._per_token.labels(record.model).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
