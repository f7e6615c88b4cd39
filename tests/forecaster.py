"""What the gate says of the work that is left, for plain Dask tasks: keys ``(stage-job, number)``, told seconds."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Scheduler
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

from dfdask.gate import Gate
from dfdask.newcomers import Newcomers

CLASS = "class:"


class Forecaster(SchedulerPlugin):
    """``seconds`` of an item by stage and class. It has the gate's name, so that no gate comes beside it."""

    name = Gate.name

    def __init__(self, seconds: Mapping[str, Mapping[str, float]]) -> None:
        self.seconds = seconds
        self.drained: list[str] = []
        self.newcomers = Newcomers()

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        scheduler.handlers["dfdask_forecast"] = self.forecast
        scheduler.handlers["dfdask_drain"] = self.drain
        scheduler.handlers["dfdask_want_worker"] = lambda: self.newcomers.want(time.time())
        scheduler.handlers["dfdask_starting"] = lambda starting: self.newcomers.tell(starting, time.time())

    def forecast(self, classes: Sequence[str] = ()) -> dict[str, Any]:
        left: Counter[tuple[str, str]] = Counter()
        for key, task in self._scheduler.tasks.items():
            if isinstance(key, tuple) and task.state in ("waiting", "no-worker", "queued", "processing"):
                stage, _, job = key[0].partition("-")
                left[job, stage] += 1
        works = [
            {"job": job, "stage": stage, "items": items, "weight": 1.0, "seconds_per_item": dict(self.seconds[stage])}
            for (job, stage), items in left.items()
        ]
        workers = {}
        for address, worker in self._scheduler.workers.items():
            kinds = [tag.removeprefix(CLASS) for tag in worker.resources if tag.startswith(CLASS)]
            held = len(worker.processing)
            workers[address] = {
                "name": str(worker.name),
                "class": kinds[0] if kinds else "",
                "idle": not held,
                "held_tasks": held,
            }
        jobs, wanted = len({work["job"] for work in works}), self.newcomers.wanted(time.time())
        return {"works": works, "workers": workers, "jobs": jobs, "wanted": wanted}

    async def drain(self, workers: list[str], timeout: float) -> list[str]:
        end = time.monotonic() + timeout
        for address in workers:
            if (worker := self._scheduler.workers.get(address)) is not None:
                self._scheduler.handle_worker_status_change(Status.paused, worker, f"drain-{time.time()}")
        while time.monotonic() < end:
            here = [address for address in workers if address in self._scheduler.workers]
            done = [address for address in here if not self._scheduler.workers[address].processing]
            if len(done) == len(here):
                break
            await asyncio.sleep(0.05)
        self.drained += done
        return done
