"""Workers that are slower or faster than their class says: a bad card, a throttled one, a noisy neighbour.

A worker's recent seconds an item are held against its class's for the same stage, by medians: neither an outlier nor
a change of all costs at once makes a straggler. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable

STEP = math.log(1.25)
"""Slowness is told in steps of a quarter: finer would only move roles about."""
_OWN = 8
_POOL = _OWN
"""No more than a worker's own: where it alone runs a stage, what peers took of it is soon too old to tell a change of
the cost from a change of the worker."""
_PEERS = 3


class Stragglers:
    """``level`` of a worker: 0 for one like its peers, 1 for one that takes 1.25 times as long, -1 for 1 / 1.25."""

    def __init__(self) -> None:
        self._pools: dict[Hashable, deque[tuple[str, float]]] = defaultdict(lambda: deque(maxlen=_POOL))
        self._own: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_OWN))
        self._levels: dict[str, int] = {}

    def observe(self, pool: Hashable, worker: str, seconds_per_item: float) -> None:
        """``pool`` is what makes tasks alike: the model, stage and device class."""
        if not seconds_per_item > 0:
            return
        recent = self._pools[pool]
        recent.append((worker, seconds_per_item))
        alike = dict(recent)  # one each in a large fleet, and this is asked whenever a task ends
        if len(alike) < _PEERS:
            return
        typical = statistics.median(alike.values() if len(alike) == len(recent) else _medians(recent))
        own = self._own[worker]
        own.append(math.log(seconds_per_item / typical))
        if len(own) == _OWN:
            slow = statistics.median(own) / STEP
            # The recent tasks must agree on the direction, and the level moves only when it is clearly passed.
            agree = min(own) > STEP / 2 or max(own) < -STEP / 2 or abs(slow) < 0.5
            if agree and abs(slow - self.level(worker)) > 0.75:
                self._levels[worker] = max(-4, min(8, round(slow)))

    def level(self, worker: str) -> int:
        return self._levels.get(worker, 0)

    def factor(self, worker: str) -> float:
        """How many times the class's seconds this worker takes."""
        return math.exp(self.level(worker) * STEP)

    def forget(self, worker: str) -> None:
        self._levels.pop(worker, None)
        self._own.pop(worker, None)


def _medians(recent: Iterable[tuple[str, float]]) -> list[float]:
    """Of each worker's own."""
    by_worker: dict[str, list[float]] = defaultdict(list)
    for name, seconds in recent:
        by_worker[name].append(seconds)
    return [statistics.median(values) for values in by_worker.values()]
