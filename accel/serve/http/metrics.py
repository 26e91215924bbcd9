"""Metrics in Prometheus' text format.

https://prometheus.io/docs/practices/naming/
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from accel.serve.protocol import Status
from accel.serve.requests.request_log import Record

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
    """States of schedulers at the moment of the scrape."""

    def __init__(self, labels: Sequence[str], states: Mapping[tuple[str, ...], Status]) -> None:
        self._labels, self._states = labels, states

    def collect(self) -> Iterator[Any]:
        """Yield one family of metrics for each of `STATES`."""
        for name, documentation, value in STATES:
            kind: Any = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, documentation, labels=self._labels)
            for values, status in self._states.items():
                family.add_metric(values, value(status))
            yield family


class Metrics:
    """Metrics of one server.

    Args:
        labels: Labels of a scheduler's state.
    """

    def __init__(self, labels: Sequence[str] = ("model",)) -> None:
        self._labels = labels
        self._registry = CollectorRegistry()
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

    def text(self, states: Mapping[tuple[str, ...], Status]) -> bytes:
        """Return all metrics in Prometheus' text format.

        Args:
            states: Values of the labels -> state of a scheduler.
        """
        schedulers = CollectorRegistry()
        schedulers.register(_Schedulers(self._labels, states))
        return generate_latest(schedulers) + generate_latest(self._registry)
