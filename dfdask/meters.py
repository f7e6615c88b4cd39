"""What Prometheus reads from a worker's ``/metrics``: counted where the work is done, in the worker's process."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from dfdask.stages.residency import resident_bytes

if TYPE_CHECKING:
    from prometheus_client import Counter


def stage_done(stage: str, items: int, seconds: float, load_seconds: float) -> None:
    """A stage call ended; ``load_seconds`` went into weights before it, 0 if they were there."""
    _show_residency()
    _counter("items", "Items that went through a stage").labels(stage).inc(items)
    _counter("stage_seconds", "Device seconds of stage calls").labels(stage).inc(seconds)
    if load_seconds:
        _counter("loads", "Times that weights were loaded or moved for a stage").labels(stage).inc()
        _counter("load_seconds", "Seconds that went into weights").labels(stage).inc(load_seconds)


@cache
def _counter(name: str, text: str) -> Counter:
    from prometheus_client import Counter

    return Counter(f"dfdask_worker_{name}", text, ["stage"])


@cache
def _show_residency() -> None:
    from prometheus_client import Gauge

    Gauge("dfdask_worker_resident_bytes", "Weights on the device").set_function(resident_bytes)
