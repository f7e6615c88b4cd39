"""Backpressure: how many results of a stage may wait for the next one, by their bytes, and how far ahead to submit.

A fleet whose workers hold all their stages needs a few results in stock and no more. One that must load
weights to follow the work gains by working far ahead, until loads are a small part of its time. Pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable

from dfdask.controller import Controller
from dfdask.dispatch import Dispatcher, Kind
from dfdask.ledger import Ledger, StageAccount

STOCK_BATCHES_PER_WORKER = 8
WINDOW_BATCHES_PER_WORKER = 10  # shards end late: with 6, eight workers stood still for 0.3 s now and then
MOST_WINDOW_BATCHES = 8192  # each is a few tasks of 5 kB in the scheduler
UNKNOWN_ITEM_BYTES = 1 << 20
HOST_BYTES = 2 << 30  # of a worker without a memory limit
WAITING_PART = 0.4
"""The part of a worker's host memory that results may take while they wait."""


class Flow:
    """Keeps the dispatcher's limits in line with what results weigh."""

    def __init__(self, dispatcher: Dispatcher, controller: Controller, ledger: Ledger) -> None:
        self._dispatcher, self._controller, self._ledger = dispatcher, controller, ledger
        self._waiting: dict[Hashable, tuple[Kind, int, int, StageAccount | None]] = {}

    def made(self, key: Hashable, kind: Kind, items: int, nbytes: int) -> None:
        """A result is in memory."""
        self.used(key)
        job = self._ledger.jobs.get(kind[0])
        account = job.stage(kind[1]) if job is not None else None
        self._waiting[key] = kind, items, nbytes, account
        if account is not None:
            account.waiting_items += items
            account.waiting_bytes += nbytes

    def used(self, key: Hashable) -> None:
        """A result is not in memory any more: the next stage has done with it, or its worker is gone."""
        if key not in self._waiting:
            return
        kind, items, nbytes, account = self._waiting.pop(key)
        self._dispatcher.used(kind, items)
        if account is not None:  # the one it was added to: the run may have been announced again since
            account.waiting_items -= items
            account.waiting_bytes -= nbytes

    def set_limits(self) -> None:
        """For all jobs, as far as sizes are known by now."""
        workers = max(len(self._ledger.workers), 1)
        handoffs = sum(max(len(job.stages) - 1, 0) for job in self._controller.jobs.values())
        room = self._room_bytes() / max(handoffs, 1)
        works_ahead = self._controller.works_ahead
        for run, job in self._controller.jobs.items():
            usual = STOCK_BATCHES_PER_WORKER * workers * job.batch
            worth_it = max(usual, self._controller.turn_items(run))
            for stage, following in itertools.pairwise(job.stages):
                kind = run, stage.name
                each = self._ledger.jobs[run].stage(stage.name).bytes_per_item or UNKNOWN_ITEM_BYTES
                ahead = max(room // max(each, 1.0), 1.0)
                self._controller.set_ahead(kind, min(ahead, worth_it))
                limit = min(ahead, worth_it if works_ahead else usual)
                self._dispatcher.follow(kind, (run, following.name), limit)

    def window(self, run: str) -> int:
        """Micro-batches that the client of ``run`` should have submitted and not yet seen committed."""
        job = self._controller.jobs.get(run)
        usual = WINDOW_BATCHES_PER_WORKER * max(len(self._ledger.workers), 1)
        if job is None or not self._controller.works_ahead:
            return usual
        ahead = min((self._dispatcher.limit_items((run, stage.name)) for stage in job.stages[:-1]), default=0)
        batches = min(ahead if math.isfinite(ahead) else MOST_WINDOW_BATCHES * job.batch, max(job.items, 1)) / job.batch
        return max(usual, min(math.ceil(batches), MOST_WINDOW_BATCHES))

    def _room_bytes(self) -> float:
        return sum(WAITING_PART * (account.host_bytes or HOST_BYTES) for account in self._ledger.workers.values())
