"""Counters of the service, and of its bank, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from rb_gpu.bank import ReasoningBank
from rb_gpu.prometheus import bank_metrics, metric

# upper bounds in seconds
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class Metrics:
    """Requests by route and status, and their durations. Only one event loop writes them, so there is no lock."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, route: str, status: int, seconds: float) -> None:
        """Counts one request."""
        self._requests[route, status] += 1
        self._buckets[bisect_left(BUCKETS, seconds)] += 1
        self._seconds += seconds

    def render(self, bank: ReasoningBank, in_flight: int) -> str:
        """All counters, including those of the bank."""
        total, cumulated = 0, []
        for bound, count in zip((*BUCKETS, "+Inf"), self._buckets, strict=True):
            total += count
            cumulated.append((f'_bucket{{le="{bound}"}}', total))
        requests = [
            (f'{{route="{route}",status="{status}"}}', count)
            for (route, status), count in sorted(self._requests.items())
        ]
        return (
            metric("requests_total", "counter", "Requests by route and status.", *requests)
            + metric("request_seconds", "histogram", "Wall seconds of a request.",
                     *cumulated, ("_sum", self._seconds), ("_count", total))
            + metric("requests_in_flight", "gauge", "Requests under way.", ("", in_flight))
            + bank_metrics(bank)
        )  # fmt: skip
