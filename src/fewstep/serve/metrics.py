"""Metrics for Prometheus, read off the engine when they are asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
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

__all__ = ["Numbers", "metrics", "numbers"]


Numbers = dict[str, Any]  # of one engine: "process", "gauges", "counts", "stages"
GAUGES = {
    "queue_pictures": "Pictures that wait",
    "running_pictures": "Pictures that are being made",
    "batch_pictures": "Pictures in the newest evaluation",
    "evaluations_per_second": "Evaluations of pictures, lately",
    "kept_pictures": "Pictures that can be refined",
}
COUNTS = {
    "evaluations": "Evaluations of pictures",
    "batches": "Evaluations of batches",
    "late_evaluations": "Evaluations of requests cancelled meanwhile",
    "pictures": "Pictures that were finished",
    "requests_finished": "Requests that were finished",
    "requests_cancelled": "Requests that were cancelled",
    "requests_refused": "Requests for which the queue had no room",
    "requests_failed": "Requests that failed",
}


def numbers(service: Service) -> Numbers:
    """What a service has to tell now, as plain numbers."""
    engine, stats = service.engine, service.engine.stats
    gauges = (engine.waiting(), engine.running, stats.last_batch, stats.speed, len(service.store))
    counts = (
        *(stats.evaluations, stats.batches, stats.late, stats.pictures),
        *(stats.jobs, stats.cancelled, stats.refused, stats.failed),
    )
    return {
        "process": os.getpid(),
        "gauges": dict(zip(GAUGES, gauges, strict=True)),
        "counts": dict(zip(COUNTS, counts, strict=True)),
        "stages": {name: (list(one.counts), one.total) for name, one in stats.stages.items()},
    }


class Reports(Collector):
    """The numbers of all replicas, with the replica as a label where it has a name."""

    def __init__(self, reports: Mapping[str, Numbers], answers: Counter[int]) -> None:
        self.reports, self.answers = reports, answers
        self.labels = ["replica"] if any(reports) else []

    def collect(self) -> Iterator[Metric]:
        for name, help in GAUGES.items():
            gauge = GaugeMetricFamily(f"fewstep_{name}", help, labels=self.labels)
            yield self._filled(gauge, "gauges", name)
        for name, help in COUNTS.items():
            counter = CounterMetricFamily(f"fewstep_{name}", help, labels=self.labels)
            yield self._filled(counter, "counts", name)
        answers = CounterMetricFamily(
            "fewstep_http_answers", "Answers by status", labels=["status"]
        )
        for status, count in sorted(self.answers.items()):
            answers.add_metric([str(status)], count)
        yield answers
        seconds = HistogramMetricFamily(
            "fewstep_seconds", "Seconds by stage", labels=["stage", *self.labels]
        )
        for replica, report in self.reports.items():
            for stage, (counts, total) in report["stages"].items():
                running = accumulate(counts)
                buckets = list(zip((*map(str, BOUNDS), "+Inf"), running, strict=True))
                seconds.add_metric([stage, *self._label(replica)], buckets, total)
        yield seconds

    def _label(self, replica: str) -> list[str]:
        return [replica] if self.labels else []

    def _filled(self, family: Any, kind: str, name: str) -> Metric:
        for replica, report in self.reports.items():
            family.add_metric(self._label(replica), report[kind][name])
        return family


def metrics(reports: Mapping[str, Numbers], answers: Counter[int]) -> bytes:
    """The text that Prometheus reads.

    Args:
        reports: of each replica by its name; the empty name where there is one
        answers: of HTTP, by status
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Reports(reports, answers))
    return generate_latest(registry)
