"""The records that the page's history consists of."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

BIN_SECONDS = 2
"""How much time one bar of the whole fleet stands for."""
USES = ("busy", "load", "blocked", "starving")
"""What a worker's time goes to, other than idleness."""


class Tail(Generic[T]):
    """The newest values; ``since`` gives a reader those that came after its last look."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._values: deque[T] = deque(maxlen=limit)

    def append(self, value: T) -> None:
        self._values.append(value)
        self.count += 1

    def since(self, seen: int) -> list[T]:
        """What was appended after the first ``seen`` values, as far as it is still here, oldest first."""
        new = min(self.count - seen, len(self._values))
        return [self._values[place] for place in range(len(self._values) - new, len(self._values))]


@dataclass(slots=True)
class Bar:
    """Calls of one stage on one worker, one right after the other.

    Without ``calls`` the worker only had the task: before it computed, or, without a ``run``, until now.
    """

    worker: str
    run: str
    stage: str
    start: float
    end: float
    items: int
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """A change of a worker at a moment; ``kind`` is "retag", "joined" or "left"."""

    when: float
    worker: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """Seconds per item of one call."""

    stage: str
    predicted_seconds: float
    measured_seconds: float


@dataclass(frozen=True, slots=True)
class Use:
    """Shares of the fleet's time between two looks, by ``USES``; what is left is idle."""

    when: float
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of results that wait for the next stage, by the stage that made them."""

    when: float
    stage_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Picture:
    run: str
    row: int
    jpeg: bytes


@dataclass(slots=True)
class Failure:
    """Equal messages of one job."""

    run: str
    text: str
    when: float
    times: int = 1


class Bin:
    """What the whole fleet did in ``BIN_SECONDS`` from ``start`` on: busy seconds by stage, and retags."""

    __slots__ = ("start", "stage_seconds", "retags", "last_retag")

    def __init__(self, start: float) -> None:
        self.start = start
        self.stage_seconds: defaultdict[str, float] = defaultdict(float)
        self.retags = 0
        self.last_retag = ""
