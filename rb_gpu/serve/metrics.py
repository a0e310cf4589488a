"""Counters of the service in Prometheus's text format (prometheus.io, Exposition formats, version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from rb_gpu.bank import ReasoningBank

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# upper bounds in seconds
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class Metrics:
    """Requests by route and status, and how long they took. One event loop writes it, so it takes no lock."""

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
        """All counters, those of the bank too."""
        stats, out = bank.stats(), []

        def metric(name: str, kind: str, help_text: str, *samples: tuple[str, float]) -> None:
            out.append(f"# HELP rb_gpu_{name} {help_text}\n# TYPE rb_gpu_{name} {kind}")
            out.extend(f"rb_gpu_{name}{labels} {value:.12g}" for labels, value in samples)

        requests = sorted(self._requests.items())
        metric(
            "requests_total", "counter", "Requests by route and status.",
            *((f'{{route="{route}",status="{status}"}}', count) for (route, status), count in requests),
        )  # fmt: skip
        total, cumulated = 0, []
        for bound, count in zip((*BUCKETS, "+Inf"), self._buckets, strict=True):
            total += count
            cumulated.append((f'_bucket{{le="{bound}"}}', total))
        metric(
            "request_seconds", "histogram", "Wall seconds of a request.",
            *cumulated, ("_sum", self._seconds), ("_count", total),
        )  # fmt: skip
        metric("requests_in_flight", "gauge", "Requests under way.", ("", in_flight))
        metric("lookups_total", "counter", "Queries answered.", ("", stats.total_lookups))
        hits = round(stats.pattern_hit_rate * stats.total_lookups)
        metric("hits_total", "counter", "Queries for which a pattern chose.", ("", hits))
        metric("confidence_mean", "gauge", "Mean confidence of answers.", ("", stats.avg_recommendation_confidence))
        metric("feedback_total", "counter", "Votes counted.", ("", stats.total_feedback))
        metric("trajectories_dropped_total", "counter", "Records that the log refused.", ("", bank.dropped))
        metric("patterns", "gauge", "Patterns of all levels served.", ("", stats.total_patterns))
        metric("reloads_total", "counter", "Artifacts put in place after the first.", ("", bank.reloads))
        metric("reload_failing", "gauge", "1 where the newest artifact cannot be served.",
               ("", float(bank.reload_error is not None)))  # fmt: skip
        version = bank.version.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        metric("artifact_info", "gauge", "The version served.", (f'{{version="{version}"}}', 1))
        return "\n".join(out) + "\n"
