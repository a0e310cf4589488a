"""A bank's statistics in Prometheus's text format (prometheus.io, Exposition formats, version 0.0.4), needing only
NumPy: a service that has a metrics page of its own appends `bank_metrics(bank)` to it.
"""

from __future__ import annotations

from rb_gpu.bank import ReasoningBank

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metric(name: str, kind: str, help_text: str, *samples: tuple[str, float]) -> str:
    """The lines of the metric rb_gpu_`name`. samples: pairs of labels or suffix, and value; NaN means unknown."""
    lines = [f"rb_gpu_{name}{labels} {'NaN' if value != value else f'{value:.12g}'}" for labels, value in samples]
    return "\n".join([f"# HELP rb_gpu_{name} {help_text}", f"# TYPE rb_gpu_{name} {kind}", *lines, ""])


def bank_metrics(bank: ReasoningBank) -> str:
    """Counters of what this process has answered since it started, and held-out results of the artifact it serves."""
    stats = bank.stats()
    hits = round(stats.pattern_hit_rate * stats.total_lookups)
    version = bank.version.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return "".join(
        (
            metric("lookups_total", "counter", "Queries answered.", ("", stats.total_lookups)),
            metric("hits_total", "counter", "Queries for which a pattern chose.", ("", hits)),
            metric("confidence_mean", "gauge", "Mean confidence of answers.",
                   ("", stats.avg_recommendation_confidence)),
            metric("expected_gain_mean", "gauge", "Mean expected gain over the default, in utility (floor: quality).",
                   ("", stats.avg_expected_gain)),
            metric("improvement_percent", "gauge", "Held-out quality over the default's, NaN if unknown.",
                   ("", stats.avg_improvement_percent)),
            metric("feedback_total", "counter", "Votes counted.", ("", stats.total_feedback)),
            metric("trajectories_dropped_total", "counter", "Records that the log refused.", ("", bank.dropped)),
            metric("log_queue", "gauge", "Records that are not in the log's file yet.", ("", bank.log_queued)),
            metric("log_failing", "gauge", "1 if the log's file cannot be written.",
                   ("", float(bank.log_failing))),
            metric("trajectories", "gauge", "Trajectories learned from, and recorded by this process.",
                   ("", stats.total_trajectories)),
            metric("patterns", "gauge", "Patterns of all levels served.", ("", stats.total_patterns)),
            metric("verdicts", "gauge", "Leaves for which a config other than the default is recommended.",
                   ("", stats.total_verdicts)),
            metric("reloads_total", "counter", "Artifacts put in place after the first.", ("", bank.reloads)),
            metric("reload_failing", "gauge", "1 if the newest artifact cannot be served.",
                   ("", float(bank.reload_error is not None))),
            metric("artifact_info", "gauge", "The version served.", (f'{{version="{version}"}}', 1)),
        )
    )  # fmt: skip
