"""What can be watched while a job runs: frozen values, handed to observers.

``Progress`` and ``ShardCommitted`` are the client's. ``ClusterState`` is a snapshot of all jobs and workers that the
gate gives, the events below it are what happened in between. All times are seconds since the epoch. An observer
that raises never stops a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

Phase = Literal["preparing", "running", "paused", "stopping", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Where the items of one stage are: ``queued`` at the gate, ``running`` on workers, ``done``."""

    name: str
    queued: int
    running: int
    done: int
    workers: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of a job.

    ``items`` counts the rows of the output; ``committed_items`` those that the store holds, of which
    ``resumed_items`` were there before this process started and ``failed_items`` carry an error.
    ``items_per_second`` and ``eta_seconds`` are None until an item is through the last stage, and in a pause.
    ``unserved`` are stages that no worker may run now, ``starting`` the workers that a cluster which follows its work
    has asked for.
    """

    run: str
    output: str
    phase: Phase
    items: int
    committed_items: int
    resumed_items: int
    failed_items: int
    shards: int
    committed_shards: int
    elapsed_seconds: float
    items_per_second: float | None
    eta_seconds: float | None
    stages: tuple[StageProgress, ...]
    workers: int
    dashboard: str | None
    unserved: tuple[str, ...] = ()
    starting: int = 0

    @property
    def all_failed(self) -> bool:
        return 0 < self.items == self.failed_items


@dataclass(frozen=True, slots=True)
class ShardCommitted:
    """One shard is safe in the store. ``stale`` means that another writer had committed it first."""

    shard: int
    items: int
    failed_items: int
    worker: str
    stage_seconds: dict[str, float]
    stale: bool


@dataclass(frozen=True, slots=True)
class StageState:
    """One stage of a job on the cluster.

    Items are ``queued`` at the gate, ``running`` (assigned to workers), ``waiting`` (done, their results held in memory
    for the next stage) and ``done``. ``predicted_seconds`` and ``measured_seconds`` are per item on the fleet as it is
    used; ``error`` is the running mean of the predictions' relative errors; None where nothing is known yet.
    """

    name: str
    queued: int
    running: int
    waiting: int
    done: int
    workers: int
    device_seconds: float
    waiting_bytes: int
    predicted_seconds: float | None
    measured_seconds: float | None
    error: float | None


@dataclass(frozen=True, slots=True)
class JobState:
    """A job on the cluster. ``run`` is the token in its task keys; ``forecast_seconds`` until it ends by prediction."""

    run: str
    name: str
    output: str
    started: float
    priority: float
    items: int
    committed_items: int
    failed_items: int
    stages: tuple[StageState, ...]
    forecast_seconds: float | None


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker: what it may run (share of its time by stage; 0: only to help), and what it did with its time so far.

    ``running`` is the stage of the task that it computes, if any. ``starving_seconds``: nothing of its roles was ready;
    ``blocked_seconds``: there was, but too many results wait for the next stage; ``load_seconds``: weights.
    """

    address: str
    name: str
    device_class: str
    memory_bytes: int
    roles: Mapping[str, float]
    running: str | None
    held_tasks: int
    joined: float
    busy_seconds: float
    load_seconds: float
    starving_seconds: float
    blocked_seconds: float


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Everything at one moment. ``gate_seconds`` is the scheduler CPU that the gate has used."""

    when: float
    jobs: tuple[JobState, ...]
    workers: tuple[WorkerState, ...]
    gate_seconds: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened on the cluster, at ``when``."""

    when: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the event's kind; numbers that are not finite become None."""
        values = asdict(self).items()
        finite = {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values}
        return {"event": type(self).__name__, **finite}


@dataclass(frozen=True, slots=True)
class JobStarted(Event):
    run: str
    name: str
    output: str
    items: int


@dataclass(frozen=True, slots=True)
class JobEnded(Event):
    """``items`` were asked for, ``committed_items`` are in the store, ``failed_items`` of them with an error."""

    run: str
    reason: str
    items: int = 0
    committed_items: int = 0
    failed_items: int = 0


@dataclass(frozen=True, slots=True)
class WorkerJoined(Event):
    worker: str
    device_class: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerLeft(Event):
    """``lost_tasks`` were assigned to it and go elsewhere."""

    worker: str
    lost_tasks: int


@dataclass(frozen=True, slots=True)
class RolesChanged(Event):
    """A worker's time shares by stage, before and after, and why.

    ``policy`` is the placement that won; ``predicted_seconds`` until the last job ends with it, ``stay_seconds`` if
    nothing had changed.
    """

    worker: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    reason: str
    policy: str
    predicted_seconds: float
    stay_seconds: float


@dataclass(frozen=True, slots=True)
class TaskDone(Event):
    """A stage call ended. ``seconds`` of its device, from ``start`` on; ``predicted_seconds`` as believed before."""

    run: str
    stage: str
    worker: str
    items: int
    start: float
    seconds: float
    load_seconds: float
    predicted_seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class ItemQuarantined(Event):
    """An item killed its workers so often that it is given up: it becomes a failed row."""

    run: str
    item: int
    stage: str
    kills: int


@dataclass(frozen=True, slots=True)
class ShardWritten(Event):
    """A shard is in the store; ``thumbnails`` are small JPEG pictures of some of its items, by row."""

    run: str
    shard: int
    items: int
    failed_items: int
    errors: tuple[str, ...]
    thumbnails: Mapping[int, bytes] = field(default_factory=dict, repr=False)
