"""Looks at the gate while a page is open: one look a second for all pages."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from dfdask.dashboard.history import History
from dfdask.dashboard.palette import Palette
from dfdask.gate import NAME as GATE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bokeh.document import Document
    from distributed.scheduler import Scheduler

    from dfdask.dashboard.page import View

logger = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
MOST_OF_CPU = 0.008  # looks become rarer rather than take a larger share; what Bokeh sends comes on top, a third
SLOWEST_SECONDS = 10.0
PATIENCE = 5  # looks, or updates of a page, that may fail in a row: Bokeh trips over a pandas that is being imported


class Stopwatch:
    """Adds up the CPU seconds of the blocks that it is around."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.thread_time() - self._started


class Sampler:
    """One per scheduler. Runs while there are views; they are held weakly, by their documents."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._views: weakref.WeakSet[View] = weakref.WeakSet()
        self._palette = Palette()
        self._timer: asyncio.TimerHandle | None = None
        self.history = History()
        self.spent = Stopwatch()
        self.looks = 0
        self._spent_before = 0.0
        self._costs: deque[float] = deque(maxlen=3)
        self._failures = 0  # in a row

    def open(self, document: Document, extra: Mapping[str, Any]) -> None:
        """Fill a new page and keep it up to date until its session ends."""
        from dfdask.dashboard.page import View, render

        before = self.spent.seconds
        with self.spent:
            self._look()
            view = View(document, self._palette, extra)
            view.show(self.history, render(self.history, self._palette))
        self._spent_before += self.spent.seconds - before  # to open a page says nothing about what looks cost
        self._views.add(view)
        # The document keeps the view alive. A callback for the session's end would make Bokeh collect all garbage of
        # the scheduler's process once more than it does anyway.
        document.dfdask_view = view  # type: ignore[attr-defined]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_SECONDS, self._tick)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._views.clear()

    def _look(self) -> None:
        gate: Any = self._scheduler.plugins.get(GATE)
        if gate is not None:
            memory = sum(worker.metrics.get("memory", 0) for worker in self._scheduler.workers.values())
            self.history.observe(gate.state(), gate.events, memory)

    def _tick(self) -> None:
        from dfdask.dashboard.page import render

        self._timer = None
        for view in list(self._views):
            if not view.is_open:
                self._views.discard(view)
            elif view.failures >= PATIENCE:
                logger.warning("dfdask: a dashboard page is no longer updated", exc_info=view.problem)
                self._views.discard(view)
        if not self._views:
            return
        try:
            with self.spent:
                self._look()
                texts = render(self.history, self._palette)
            for view in list(self._views):
                view.send(self.history, texts, self.spent)
            self.looks, self._failures = self.looks + 1, 0
        except Exception:
            self._failures += 1
            if self._failures >= PATIENCE:
                logger.warning("dfdask: dashboard pages are no longer updated", exc_info=True)
                self._views.clear()
                return
        # The views change their documents after this, so that counts with the next look. A single look may cost more
        # because something was imported or collected.
        self._costs.append(self.spent.seconds - self._spent_before)
        self._spent_before = self.spent.seconds
        pause = min(max(EVERY_SECONDS, statistics.median(self._costs) / MOST_OF_CPU), SLOWEST_SECONDS)
        self._timer = asyncio.get_running_loop().call_later(pause, self._tick)
