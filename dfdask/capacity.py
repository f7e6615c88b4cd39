"""What stages take of a device's memory, what bringing them there costs, and the terms of a placement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dfdask.blocks import streamed_name
from dfdask.tags import UNKNOWN_CLASS


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a stage on a class of devices.

    ``weights`` are the bytes that each component keeps on the device, ``working_bytes`` what a batch needs beside
    them; ``load_seconds`` brings all weights there. ``streamed``: these are the least, and the rest passes through the
    device block by block, of which the worker keeps as many as there is room for.
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


LINK_BYTES_PER_SECOND = 20e9
"""What a device gets from page-locked memory over 16 lanes of PCIe 4.0, about."""


def ways(whole: Option, streamed: Mapping[str, int], device_class: str, passing_bytes: float = 0.0) -> list[Option]:
    """A stage as a ``whole``, and streamed where that keeps only ``streamed`` bytes of each component.

    A call takes no less than its weights take to pass by: ``passing_bytes``, 0 where its seconds were measured and tell
    it. Not on a CPU, which has no other memory to stream from.
    """
    if not streamed or device_class == UNKNOWN_CLASS:
        return [whole]
    weights = {streamed_name(name): size for name, size in streamed.items()}
    seconds = max(whole.seconds_per_item, passing_bytes / LINK_BYTES_PER_SECOND / whole.batch)
    return [whole, replace(whole, seconds_per_item=seconds, weights=weights, streamed=True)]


def usable(options: Iterable[Option], memory_bytes: int) -> list[Option]:
    """Those that a device may use: where any fits as a whole, none is streamed, for a worker does not either."""
    fitting = [option for option in options if fits([option], memory_bytes)]
    return [option for option in fitting if not option.streamed] or fitting


def fits(options: Iterable[Option], memory_bytes: int) -> bool:
    """Whether a device can run these side by side: shared components once, one batch at a time.

    Nothing fits beside a component that is streamed: it takes what room there is.
    """
    weights: dict[str, int] = {}
    working = 0
    options = list(options)
    if len(options) > 1 and any(option.streamed for option in options):
        return False
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
