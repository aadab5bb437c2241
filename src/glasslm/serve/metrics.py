"""The numbers of /metrics, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.tokens = Counter(
            "glasslm_tokens",
            "Tokens that were read (prompt) and generated (completion).",
            ["model", "kind"],
            registry=self._registry,
        )
        self.requests = Counter(
            "glasslm_requests", "Requests by path and status.", ["path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "glasslm_request_seconds", "Duration of requests.", ["path"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "glasslm_first_token_seconds", "From a request to its first token.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.cancelled = Counter(
            "glasslm_cancelled", "Requests whose client left.", registry=self._registry
        )
        self.refused = Counter(
            "glasslm_refused", "Requests that were refused, by status.", ["status"],
            registry=self._registry,
        )  # fmt: skip

    def add_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A number that is asked for at each reading of the metrics."""
        Gauge(f"glasslm_{name}", text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
