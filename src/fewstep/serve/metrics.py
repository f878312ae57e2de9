"""Metrics for Prometheus, read off the engine when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fewstep.serve.service import Service
from fewstep.serve.statistics import BOUNDS

__all__ = ["metrics"]


class Engine(Collector):
    """The numbers of one service."""

    def __init__(self, service: Service, answers: Counter[int]) -> None:
        self.service, self.answers = service, answers

    def collect(self) -> Iterator[Metric]:
        service = self.service
        engine, stats = service.engine, service.engine.stats
        gauges: dict[str, tuple[str, Any]] = {
            "queue_pictures": ("Pictures that wait", engine.waiting()),
            "running_pictures": ("Pictures that are being made", engine.running),
            "batch_pictures": ("Pictures in the newest evaluation", stats.last_batch),
            "evaluations_per_second": ("Evaluations of pictures, lately", stats.speed),
            "kept_pictures": ("Pictures that can be refined", len(service.store)),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"fewstep_{name}", help, value)
        counts = {
            "evaluations": ("Evaluations of pictures", stats.evaluations),
            "batches": ("Evaluations of batches", stats.batches),
            "late_evaluations": ("Evaluations of requests cancelled meanwhile", stats.late),
            "pictures": ("Pictures that were finished", stats.pictures),
            "requests_finished": ("Requests that were finished", stats.jobs),
            "requests_cancelled": ("Requests that were cancelled", stats.cancelled),
            "requests_refused": ("Requests for which the queue had no room", stats.refused),
            "requests_failed": ("Requests that failed", stats.failed),
        }
        for name, (help, value) in counts.items():
            yield CounterMetricFamily(f"fewstep_{name}", help, value)
        answers = CounterMetricFamily(
            "fewstep_http_answers", "Answers by status", labels=["status"]
        )
        for status, count in sorted(self.answers.items()):
            answers.add_metric([str(status)], count)
        yield answers
        seconds = HistogramMetricFamily("fewstep_seconds", "Seconds by stage", labels=["stage"])
        for name, times in stats.stages.items():
            running, buckets = 0, []
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), times.counts, strict=True):
                running += count
                buckets.append((bound, running))
            seconds.add_metric([name], buckets, times.total)
        yield seconds


def metrics(service: Service, answers: Counter[int]) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Engine(service, answers))
    return generate_latest(registry)
