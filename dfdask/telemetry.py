"""What finished tasks tell: their seconds to the cost model, their counts to the books, all of it to observers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dfdask.controller import Controller
from dfdask.dispatch import Kind
from dfdask.events import ShardWritten, TaskDone
from dfdask.ledger import JobAccount, Ledger
from dfdask.stage_tasks import computed

TELEMETRY = "dfdask"
"""The key of what dfdask's tasks leave in their metadata, and of what the gate tells them in their annotations."""


class Telemetry:
    """Takes in a task's transition to memory; ``details`` are the transition's, as Dask hands them to plugins."""

    def __init__(self, ledger: Ledger, controller: Controller) -> None:
        self._ledger, self._controller = ledger, controller

    def shard_written(self, run: str, details: Mapping[str, Any]) -> None:
        told = _told(details)
        job = self._ledger.jobs.get(run)
        if job is not None and told:
            job.committed_items += told["items"]
            job.failed_items += told["failed_items"]
            self._ledger.note(ShardWritten(time.time(), run, **told))

    def task_done(self, job: JobAccount, kind: Kind, items: int, worker: str, first: bool, details: Any) -> None:
        """A stage call ended on ``worker``; ``first`` unless its result had been lost and was made again."""
        told = _told(details)
        begin, compute = computed(details.get("startstops"))
        seconds, load_seconds = told.get("seconds", compute), told.get("load_seconds", 0.0)
        nbytes = int(details.get("nbytes") or 0)
        # A call with items that failed, here or before, says nothing of what they take.
        whole = told.get("items", items) == items
        predicted = self._controller.finished(kind, items, worker, seconds, load_seconds, again=not first, whole=whole)
        stage = job.stage(kind[1])
        if whole:
            stage.finish(items, seconds, nbytes, predicted)
        else:
            stage.device_seconds += seconds
        if first:
            stage.done_items += items
        if "holds" in told:
            self._controller.holds(worker, frozenset(told["holds"]))
        self._controller.used_memory(kind, worker, told.get("facts", {}).get("peak_bytes", 0))
        account = self._ledger.workers.get(worker)
        if account is not None:
            account.busy_seconds += seconds
            account.load_seconds += load_seconds
        start = told.get("start", begin)
        self._ledger.note(TaskDone(time.time(), *kind, worker, items, start, seconds, load_seconds, predicted, nbytes))


def _told(details: Mapping[str, Any]) -> dict[str, Any]:
    return (details.get("metadata") or {}).get(TELEMETRY) or {}
