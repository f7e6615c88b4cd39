"""What stages take of a device's memory, what bringing them there costs, and the terms of a placement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a stage on a class of devices.

    ``weights`` are the bytes that each component keeps on the device, ``working_bytes`` what a batch needs beside
    them; ``load_seconds`` brings all weights there.
    """

    seconds_per_item: float
    batch: int = 1
    weights: Mapping[str, int] = field(default_factory=dict)
    working_bytes: int = 0
    load_seconds: float = 0.0
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class StageWork:
    """What is left of one stage of a job; ``options`` by device class, none where it cannot run.

    ``weight`` is the job's part of the fleet in relation to other jobs; ``ahead_items`` how many of the stage's
    results may wait for the next stage: it limits the length of a turn.
    """

    job: str
    stage: str
    items: float
    options: Mapping[str, Sequence[Option]]
    weight: float = 1.0
    ahead_items: float = math.inf


@dataclass(frozen=True, slots=True)
class Device:
    """A worker: what it has on its device now, and the (job, stage) pairs that are its roles now."""

    name: str
    device_class: str = "cpu"
    memory_bytes: int = 0
    holds: frozenset[str] = frozenset()
    runs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Role:
    """A stage that a worker may run. A share of 0 is help: only when nothing of its own is ready."""

    job: str
    stage: str
    share: float
    option: Option


def fits(options: Iterable[Option], memory_bytes: int) -> bool:
    """Whether a device can run these side by side: shared components once, one batch at a time."""
    weights: dict[str, int] = {}
    working = 0
    for option in options:
        for name, size in option.weights.items():
            weights[name] = max(size, weights.get(name, 0))
        working = max(working, option.working_bytes)
    return sum(weights.values()) + working <= memory_bytes


def load_seconds(options: Iterable[Option], holds: frozenset[str]) -> float:
    """To bring there what a device lacks that ``holds`` some components."""
    total = 0.0
    loaded = set(holds)
    for option in options:
        missing = sum(size for name, size in option.weights.items() if name not in loaded)
        if missing:
            total += option.load_seconds * missing / sum(option.weights.values())
        loaded.update(option.weights)
    return total
