"""Idle workers load the stage of a new role before its first task is there: a pipeline's stages load side by side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dfdask.controller import Controller
from dfdask.dispatch import Dispatcher, Kind
from dfdask.ledger import Ledger

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

logger = logging.getLogger(__name__)
WARM_UP = "dfdask_warm_up"
"""The name under which workers take this call."""


class WarmUp:
    """Calls workers whose roles changed and who have nothing to do. ``refs`` are pickled ModelRefs by run: the gate
    hands them on unread.
    """

    def __init__(
        self, dispatcher: Dispatcher, controller: Controller, ledger: Ledger, on_loaded: Callable[[], None]
    ) -> None:
        self._dispatcher, self._controller, self._ledger = dispatcher, controller, ledger
        self._on_loaded = on_loaded
        self._changed: set[str] = set()
        self._calls: dict[str, asyncio.Task[None]] = {}
        self.refs: dict[str, bytes] = {}

    def role_changed(self, worker: str) -> None:
        self._changed.add(worker)

    def begin(self, scheduler: Scheduler) -> None:
        """Once what is ready was placed: who got a task loads with that. One call at a time for each worker."""
        for worker in self._changed - self._calls.keys():
            self._changed.discard(worker)
            kind = self._to_load(worker)
            if kind is not None:
                self._calls[worker] = asyncio.ensure_future(self._call(scheduler, worker, kind))

    def _to_load(self, worker: str) -> Kind | None:
        """Its first own stage. None where its work says what to load: it has some, or will take turns."""
        seat = self._controller.seat(worker)
        if seat is None or seat.turns or self._dispatcher.held(worker):
            return None
        return next((kind for kind in seat.own or () if kind[0] in self.refs), None)

    async def _call(self, scheduler: Scheduler, worker: str, kind: Kind) -> None:
        run, stage = kind
        account = self._ledger.workers.get(worker)
        if account is None:
            self._calls.pop(worker, None)
            return
        account.set_busy(time.time())  # not idle: the time counts as loading
        told: dict[str, Any] | None = None
        try:
            told = await getattr(scheduler.rpc(worker), WARM_UP)(ref=self.refs[run], stage=stage)
        except Exception as error:  # it left, or cannot load the stage: its first task will say so
            logger.debug("%s did not load %s: %s", worker, stage, error)
        self._calls.pop(worker, None)
        if told is not None:
            account.load_seconds += told["seconds"]
            self._controller.loaded(kind, worker, told["seconds"])
            self._controller.holds(worker, frozenset(told["holds"]))
        if not self._dispatcher.held(worker):
            account.set_idle(time.time(), blocked=False)
        self._on_loaded()  # to news, or to another role by now
