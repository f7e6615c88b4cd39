"""Idle workers load the stage of a new role before its first task is there: a pipeline's stages load side by side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dfdask.controller import Controller
from dfdask.dispatch import Dispatcher, Kind
from dfdask.ledger import Ledger

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

WARM_UP = "dfdask_warm_up"
"""The name under which workers take this call."""


class WarmUp:
    """Calls workers whose roles changed and who have nothing to do. ``refs`` are pickled ModelRefs by run: the gate
    hands them on unread.
    """

    def __init__(self, dispatcher: Dispatcher, controller: Controller, ledger: Ledger) -> None:
        self._dispatcher, self._controller, self._ledger = dispatcher, controller, ledger
        self._changed: set[str] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self.refs: dict[str, bytes] = {}

    def role_changed(self, worker: str) -> None:
        self._changed.add(worker)

    def begin(self, scheduler: Scheduler) -> None:
        """Once what is ready was placed: who got a task loads with that."""
        for worker in self._changed:
            kind = self._to_load(worker)
            if kind is not None:
                call = asyncio.ensure_future(self._call(scheduler, worker, kind))
                self._calls.add(call)  # or it could be collected
                call.add_done_callback(self._calls.discard)
        self._changed.clear()

    def _to_load(self, worker: str) -> Kind | None:
        account = self._ledger.workers.get(worker)
        if account is None or self._dispatcher.held(worker):
            return None
        shares = {kind: share for kind, share in account.shares.items() if share > 0 and kind[0] in self.refs}
        return max(shares, key=lambda kind: shares[kind], default=None)

    async def _call(self, scheduler: Scheduler, worker: str, kind: Kind) -> None:
        run, stage = kind
        try:
            told: dict[str, Any] | None = await getattr(scheduler.rpc(worker), WARM_UP)(ref=self.refs[run], stage=stage)
        except Exception:  # it left, or cannot load the stage: its first task will say so
            return
        account = self._ledger.workers.get(worker)
        if told is not None and account is not None:
            account.load_seconds += told["seconds"]
            self._controller.loaded(kind, worker, told["seconds"])
            self._controller.holds(worker, frozenset(told["holds"]))
