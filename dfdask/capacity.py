"""What stages take of a device's memory, and what bringing them there costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
