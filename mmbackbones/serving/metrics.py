"""Numbers of a server for Prometheus.

Departs from the source: there is none.
"""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

__all__ = ['Metrics']

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One registry per server, so that several fit into a process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        shared = dict(registry=self._registry)
        self._requests = Counter(
            'mmb_requests', 'Answered requests', ['route', 'status'], **shared
        )
        self._latency = Histogram(
            'mmb_request_seconds',
            'From the received request to its answer',
            ['route'],
            buckets=_SECONDS,
            **shared,
        )
        self._batches = Histogram(
            'mmb_batch_size', 'Images predicted at once', buckets=_SIZES, **shared
        )
        self._predicting = Histogram(
            'mmb_predict_seconds', 'Of one batch', buckets=_SECONDS, **shared
        )
        self._queue = Gauge(
            'mmb_queue_length', 'Images that wait for the model', **shared
        )

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Ask for the length whenever the numbers are read."""
        self._queue.set_function(length)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, status).inc()
        self._latency.labels(route).observe(seconds)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self._batches.observe(size)
        self._predicting.observe(seconds)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
