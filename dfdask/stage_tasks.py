"""What Dask's tasks say to the gate: whose they are, which stage they want, where their inputs lie."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfdask.dispatch import Kind
from dfdask.tags import STAGE

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, TaskState


def plain_key(parts: Any) -> Any:
    return tuple(parts) if isinstance(parts, list) else parts


def kind_of(key: Any) -> Kind:
    stage, _, run = key[0].rpartition("-")
    return run, stage


def stage_name(key: Any) -> str:
    return str(key[0].rpartition("-")[0])


def stage_wanted(task: TaskState) -> str | None:
    for resource in task.resource_restrictions or ():
        if resource.startswith(STAGE):
            return str(resource.removeprefix(STAGE))
    return None


def order_of(task: TaskState) -> tuple[Any, ...]:
    """Later stages first, then a job's items in their own order: Dask's order of a graph mixes its branches."""
    key: Any = task.key
    return ((task.priority or (0,))[0], *key[1:3])


def computed(startstops: Any) -> tuple[float, float]:
    """When a task began to compute and for how long, by Dask's own account."""
    for entry in startstops or ():
        if entry["action"] == "compute":
            return float(entry["start"]), float(entry["stop"] - entry["start"])
    return time.time(), 0.0


def bytes_by_worker(task: TaskState) -> Mapping[str, int]:
    totals: dict[str, int] = {}
    for dependency in task.dependencies:
        for worker in dependency.who_has or ():
            totals[worker.address] = totals.get(worker.address, 0) + max(dependency.nbytes, 1)
    return totals


def home_of(scheduler: Scheduler, task: TaskState) -> str | None:
    """Where most of the task's input bytes are; a worker of another choice only if that one is gone."""
    holders, running = bytes_by_worker(task), scheduler.running
    able = [name for name in holders if scheduler.workers.get(name) in running]
    if able:
        return max(able, key=holders.__getitem__)
    return next((worker.address for worker in running), None)


def nearly_done(dask_scheduler: Scheduler, keys: Sequence[Any]) -> list[Any]:
    """Of the tasks ``keys`` those that run, or wait for nothing but what workers have or are at."""
    found = {key: dask_scheduler.tasks.get(key) for key in keys}
    at_work = {"memory", "processing"}
    return [
        key
        for key, task in found.items()
        if task is not None and (task.state in at_work or all(one.state in at_work for one in task.dependencies))
    ]
