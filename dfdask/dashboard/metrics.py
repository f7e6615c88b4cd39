"""What Prometheus reads from the scheduler's ``/metrics``; docs/metrics.md says what each number means."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dfdask.dashboard.records import USES

if TYPE_CHECKING:
    from dfdask.events import ClusterState

JOB = ["run", "name"]  # Prometheus itself adds a label `job`
STAGE = [*JOB, "stage"]


class SchedulerMetrics(Collector):
    """Asks the gate when Prometheus does, and at no other time."""

    def __init__(self, gate: Callable[[], Any], page_seconds: Callable[[], float]) -> None:
        self._gate = gate
        self._page_seconds = page_seconds
        self._known: dict[str, dict[str, float]] = {}  # seconds of each worker by use, at the last scrape
        self._fleet: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._seen = -1
        self._events: Counter[str] = Counter()

    def register(self) -> None:
        REGISTRY.register(self)

    def unregister(self) -> None:
        REGISTRY.unregister(self)

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not ask the gate."""
        return []

    def collect(self) -> Iterator[Metric]:
        gate = self._gate()
        if gate is not None:
            state = gate.state()
            yield from _jobs(state)
            yield from _stages(state)
            yield from self._workers(state)
            yield from self._happened(gate.events)
            yield _counter("gate_cpu_seconds", "scheduler CPU used by the gate", state.gate_seconds)
        yield _counter("page_cpu_seconds", "scheduler CPU used by the dashboard page", self._page_seconds())

    def _workers(self, state: ClusterState) -> Iterator[Metric]:
        now = Counter(worker.device_class for worker in state.workers)
        workers = _gauge("workers", "workers", ["device"])
        for device, number in now.items():
            workers.add_metric([device], number)
        yield workers
        roles = _gauge("role_workers", "workers by the shares of their time that a stage has", ["stage"])
        shares: defaultdict[str, float] = defaultdict(float)
        for worker in state.workers:
            for role, share in worker.roles.items():
                shares[role.rpartition("/")[2]] += share
        for stage, share in shares.items():
            roles.add_metric([stage], share)
        yield roles
        # A worker that leaves takes its seconds along: counters must not fall, so they grow by differences.
        known = {}
        for worker in state.workers:
            seconds = {use: getattr(worker, f"{use}_seconds") for use in USES}
            old = self._known.get(worker.address, {})
            for use, value in seconds.items():
                self._fleet[worker.device_class, use] += max(value - old.get(use, 0.0), 0.0)
            known[worker.address] = seconds
        self._known = known
        spent = CounterMetricFamily(
            "dfdask_fleet_seconds", "seconds of all workers by what they did with them", labels=["device", "use"]
        )
        for (device, use), value in self._fleet.items():
            spent.add_metric([device, use], value)
        yield spent

    def _happened(self, events: Any) -> Iterator[Metric]:
        for number, event in reversed(events):
            if number <= self._seen:
                break
            self._events[type(event).__name__] += 1
        if events:
            self._seen = events[-1][0]
        counts = CounterMetricFamily("dfdask_events", "what happened on the cluster", labels=["event"])
        for name, times in self._events.items():
            counts.add_metric([name], times)
        yield counts


def _jobs(state: ClusterState) -> Iterator[Metric]:
    items = _gauge("job_items", "rows of the job's output", JOB)
    committed = _gauge("job_committed_items", "rows that the store holds", JOB)
    failed = _gauge("job_failed_items", "rows that carry an error", JOB)
    forecast = _gauge("job_forecast_seconds", "until the job ends, by prediction", JOB)
    for job in state.jobs:
        labels = [job.run, job.name]
        items.add_metric(labels, job.items)
        committed.add_metric(labels, job.committed_items)
        failed.add_metric(labels, job.failed_items)
        if job.forecast_seconds is not None:
            forecast.add_metric(labels, job.forecast_seconds)
    yield _gauge("jobs", "jobs on the cluster", value=len(state.jobs))
    yield from (items, committed, failed, forecast)


def _stages(state: ClusterState) -> Iterator[Metric]:
    items = _gauge("stage_items", "items of a stage by where they are: queued, running, waiting", [*STAGE, "state"])
    done = CounterMetricFamily("dfdask_stage_done_items", "items that the stage has done", labels=STAGE)
    device = CounterMetricFamily("dfdask_stage_device_seconds", "device seconds spent", labels=STAGE)
    held = _gauge("stage_waiting_bytes", "results that wait for the next stage", STAGE)
    workers = _gauge("stage_workers", "workers that may run the stage", STAGE)
    predicted = _gauge("stage_predicted_seconds", "per item, predicted", STAGE)
    measured = _gauge("stage_measured_seconds", "per item, measured", STAGE)
    error = _gauge("stage_prediction_error_ratio", "mean relative error of the predictions", STAGE)
    for job in state.jobs:
        for stage in job.stages:
            labels = [job.run, job.name, stage.name]
            for where in ("queued", "running", "waiting"):
                items.add_metric([*labels, where], getattr(stage, where))
            done.add_metric(labels, stage.done)
            device.add_metric(labels, stage.device_seconds)
            held.add_metric(labels, stage.waiting_bytes)
            workers.add_metric(labels, stage.workers)
            known = (
                (predicted, stage.predicted_seconds),
                (measured, stage.measured_seconds),
                (error, stage.error),
            )
            for metric, value in known:
                if value is not None:
                    metric.add_metric(labels, value)
    yield from (items, done, device, held, workers, predicted, measured, error)


def _gauge(name: str, text: str, labels: list[str] | None = None, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dfdask_{name}", text, value=value, labels=labels)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"dfdask_{name}", text, value=value)
