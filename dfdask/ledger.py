"""The gate's books: what every job and worker did so far, and the events of late. Pure: times are given.

``Ledger`` only counts; it decides nothing, and what it keeps does not grow with the length of a job.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dfdask.events import Event
from dfdask.newcomers import Newcomers

EVENTS_KEPT = 50_000


@dataclass
class StageAccount:
    """Counts of one stage of a job. ``counted`` are tasks that may be computed again without counting twice."""

    done_items: int = 0
    device_seconds: float = 0.0
    waiting_items: int = 0
    waiting_bytes: int = 0
    bytes_per_item: float = 0.0
    recent_seconds: float | None = None
    error: float | None = None

    def finish(self, items: int, seconds: float, nbytes: int, predicted_seconds: float) -> None:
        self.device_seconds += seconds
        if items <= 0:
            return
        self.recent_seconds = _towards(self.recent_seconds, seconds / items, 0.1)
        self.bytes_per_item = _towards(self.bytes_per_item or None, nbytes / items, 0.1)
        if seconds > 0 and predicted_seconds > 0:
            self.error = _towards(self.error, min(abs(predicted_seconds / seconds - 1), 1.0), 0.05)


@dataclass
class JobAccount:
    """A job as its ``clients`` described it, and what the cluster did for it since; none announced it: no clients."""

    name: str
    output: str
    items: int
    committed_items: int
    failed_items: int
    started: float
    clients: set[str]
    stages: dict[str, StageAccount] = field(default_factory=dict)

    def stage(self, name: str) -> StageAccount:
        return self.stages.setdefault(name, StageAccount())


@dataclass
class WorkerAccount:
    """What a worker did with its time since it ``joined``; ``idle_since`` is None while it has tasks.

    ``memory_bytes`` are its device's, ``host_bytes`` Dask's memory limit, 0 for none.
    """

    name: str
    device_class: str
    memory_bytes: int
    host_bytes: int
    joined: float
    idle_since: float | None
    blocked: bool = False
    busy_seconds: float = 0.0
    load_seconds: float = 0.0
    starving_seconds: float = 0.0
    blocked_seconds: float = 0.0
    shares: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def set_idle(self, when: float, blocked: bool) -> None:
        """It has nothing to do: because results wait (``blocked``) or because there is nothing."""
        if self.idle_since is None:
            self.idle_since, self.blocked = when, blocked

    def set_busy(self, when: float) -> None:
        self.settle(when)
        self.idle_since = None

    def settle(self, when: float) -> None:
        """Put the idle time until now down to its cause."""
        if self.idle_since is not None:
            idle = max(when - self.idle_since, 0.0)
            if self.blocked:
                self.blocked_seconds += idle
            else:
                self.starving_seconds += idle
            self.idle_since = when


class Ledger:
    """Accounts by run token and by worker address, who is to come, and events with ever growing numbers."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobAccount] = {}
        self.workers: dict[str, WorkerAccount] = {}
        self.newcomers = Newcomers()
        self.events: deque[tuple[int, Event]] = deque(maxlen=EVENTS_KEPT)
        self._next = 0

    def note(self, event: Event) -> None:
        self.events.append((self._next, event))
        self._next += 1

    def since(self, number: int) -> Iterator[tuple[int, Event]]:
        """Events with at least this number, oldest first; those that were dropped by now are skipped."""
        skip = number - self.events[0][0] if self.events else 0
        yield from itertools.islice(self.events, max(skip, 0), None)

    def told_since(self, number: int, run: str | None) -> list[dict[str, Any]]:
        """Events of ``run`` (None: all) and of the fleet from ``number`` on, JSON-able, without pictures."""
        found = []
        for _, event in self.since(number):
            if run is None or getattr(event, "run", run) == run:
                entry = event.as_dict()
                entry.pop("thumbnails", None)
                found.append(entry)
        return found

    @property
    def next_number(self) -> int:
        return self._next


def _towards(known: float | None, value: float, part: float) -> float:
    """An exponential average that begins with the first value."""
    return value if known is None else known + part * (value - known)
