"""What the stages of a new model have to do, counted by a worker: the scheduler has none of the libraries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dfdask.controller import Controller
from dfdask.cost import ItemWork

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

logger = logging.getLogger(__name__)
COUNT = "dfdask_count"
"""The name under which workers take this call."""


class FirstCosts:
    """Has a worker count, so that roles and scaling know what stages cost before the first task has ended."""

    def __init__(self, controller: Controller, on_counted: Callable[[str], None]) -> None:
        self._controller, self._on_counted = controller, on_counted
        self._waiting: dict[str, bytes] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def ask(self, run: str, sample: bytes | None) -> None:
        """``sample`` is a pickled ModelRef and item, handed on unread; None where there is nothing to count."""
        if sample is not None:
            self._waiting[run] = sample

    def begin(self, scheduler: Scheduler) -> None:
        """As soon as there is a worker."""
        while self._waiting and scheduler.workers:
            run, sample = self._waiting.popitem()
            if not self._controller.wants_work(run):
                continue
            # The last, for the first are the first to get a task.
            call = asyncio.ensure_future(self._call(scheduler, next(reversed(scheduler.workers)), run, sample))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, scheduler: Scheduler, worker: str, run: str, sample: bytes) -> None:
        try:
            told: dict[str, Any] = await getattr(scheduler.rpc(worker), COUNT)(sample=sample)
        except Exception as error:  # it left, or the model cannot be counted: tasks will tell what they cost
            logger.debug("%s did not count the work of %s: %s", worker, run, error)
            return
        if self._controller.count_work(run, {stage: ItemWork(**work) for stage, work in told.items()}):
            self._on_counted("operations were counted")
