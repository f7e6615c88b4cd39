"""What stages take of a device's memory, what bringing them there costs, and the terms of a placement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dfdask.blocks import is_held, streamed_name
from dfdask.tags import UNKNOWN_CLASS


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a stage on a class of devices.

    ``weights`` are the bytes that each component keeps on the device, ``working_bytes`` what a batch needs beside
    them; ``load_seconds`` brings all weights there. ``streamed``: these are the least, the worker keeps as many blocks
    as there is room for, and the rest of ``whole_bytes`` passes through the device with each call, which takes
    ``pass_seconds`` an item where that is all of them; 0 where seconds were measured and tell it.
    """

    seconds_per_item: float
    batch: int = 1
    weights: Mapping[str, int] = field(default_factory=dict)
    working_bytes: int = 0
    load_seconds: float = 0.0
    streamed: bool = False
    whole_bytes: int = 0
    pass_seconds: float = 0.0


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

    ``passing_bytes`` are all weights that a call reads. Not on a CPU, which has no other memory to stream from.
    """
    if not streamed or device_class == UNKNOWN_CLASS:
        return [whole]
    weights = {streamed_name(name): size for name, size in streamed.items()}
    passing = passing_bytes / LINK_BYTES_PER_SECOND / whole.batch
    size = sum(whole.weights.values())
    return [whole, replace(whole, weights=weights, streamed=True, whole_bytes=size, pass_seconds=passing)]


def usable(options: Iterable[Option], memory_bytes: int) -> list[Option]:
    """Those that a device may use: where any fits as a whole, none is streamed, for a worker does not either.

    A streamed one takes no less than what does not fit takes to pass by.
    """
    fitting = [option for option in options if fits([option], memory_bytes)]
    found = [option for option in fitting if not option.streamed]
    return found or [_streamed_within(option, memory_bytes) for option in fitting]


def _streamed_within(option: Option, memory_bytes: int) -> Option:
    passing = max(option.whole_bytes + option.working_bytes - memory_bytes, 0) / max(option.whole_bytes, 1)
    return replace(option, seconds_per_item=max(option.seconds_per_item, option.pass_seconds * passing))


def fits(options: Iterable[Option], memory_bytes: int) -> bool:
    """Whether a device can run these side by side: shared components once, one batch at a time.

    No other component fits beside one that is streamed: it takes what room there is.
    """
    weights: dict[str, int] = {}
    working, most, streamed = 0, 0, False
    for option in options:
        most, streamed = max(most, len(option.weights)), streamed or option.streamed
        for name, size in option.weights.items():
            weights[name] = max(size, weights.get(name, 0))
        working = max(working, option.working_bytes)
    return not (streamed and len(weights) > most) and sum(weights.values()) + working <= memory_bytes


def load_seconds(options: Iterable[Option], holds: frozenset[str]) -> float:
    """To bring there what a device lacks that ``holds`` some components."""
    total = 0.0
    loaded = set(holds)
    for option in options:
        missing = sum(size for name, size in option.weights.items() if not is_held(name, loaded))
        if missing:
            total += option.load_seconds * missing / sum(option.weights.values())
        loaded.update(option.weights)
    return total
