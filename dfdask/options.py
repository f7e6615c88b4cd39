"""The ways to run a stage on a class of devices: how much of its weights stays there, and how many items at once.

Pure. The worker carries out what is chosen here as a ``Hint``; ``streamed_blocks`` is the arithmetic of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dfdask.placement import Option

SLOTS = 2
"""Blocks that have room on the device while they are streamed: one computes, one arrives."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROFIT = 0.02
"""The part of its time that an item must save for a larger batch to be worth its memory and its wait."""
Mode = Literal["auto", "resident", "streamed"]


@dataclass(frozen=True, slots=True)
class Hint:
    """How a worker shall run a micro-batch: ``batch`` items at a time, None for as many as it has.

    ``auto`` keeps all weights on the device where they fit. ``working_bytes`` is the room to leave beside streamed
    weights; None where only the worker can know. ``tiled`` lets the VAE decode in tiles.
    """

    mode: Mode = "auto"
    batch: int | None = None
    tiled: bool = False
    working_bytes: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Hint:
        """From what travels with a task; what is not known there is ignored."""
        known = {name: value for name, value in (values or {}).items() if name in cls.__dataclass_fields__}
        return cls(**known)

    def values(self) -> dict[str, Any]:
        """What ``of`` takes."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Needs:
    """What is known of a stage before it runs.

    ``weights`` are bytes by component; ``block_bytes`` those of the blocks of its largest component, which can be
    streamed. ``passes`` is how often one call goes through these blocks. Working bytes are what activations take:
    a part that every call needs and one for each item; ``tiled_bytes`` is the item's where the VAE decodes in tiles,
    None where it cannot, and ``tiled_slowdown`` what that costs.
    """

    weights: Mapping[str, int] = field(default_factory=dict)
    block_bytes: Sequence[int] = ()
    passes: float = 1.0
    working_bytes: int = 0
    item_working_bytes: int = 0
    tiled_bytes: int | None = None
    tiled_slowdown: float = 1.15
    most_items: int | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """What a worker's device can hold, and how fast it gets weights from page-locked host memory."""

    memory_bytes: int
    bytes_per_second: float = math.inf


@dataclass(frozen=True, slots=True)
class Variant:
    """An option for the placement, and how a worker carries it out."""

    option: Option
    hint: Hint


def streamed_blocks(block_bytes: Sequence[int], core_bytes: int, allowed_bytes: float) -> tuple[int, ...] | None:
    """Which blocks to stream so that a component takes no more than ``allowed_bytes``: as few as possible.

    Evenly spread, so that one arrives while resident ones compute. Empty where all fit, None where the core and
    the slots alone do not.
    """
    if core_bytes + sum(block_bytes) <= allowed_bytes:
        return ()
    count = len(block_bytes)
    for wanted in range(SLOTS, count + 1):
        if wanted % SLOTS and wanted < count:
            continue  # or a block would not find its slot free when the next pass begins
        chosen = tuple(number for number in range(count) if (number + 1) * wanted // count > number * wanted // count)
        if core_bytes + kept_bytes(block_bytes, chosen) <= allowed_bytes:
            return chosen
    return None


def streamed_name(component: str) -> str:
    """What a component is called while parts of it are streamed: having it so is not having it."""
    return f"{component} (streamed)"


def kept_bytes(block_bytes: Sequence[int], streamed: Sequence[int]) -> int:
    """Device bytes of a component's blocks where some are streamed: the others and the slots."""
    if not streamed:
        return sum(block_bytes)
    passing = set(streamed)
    slots = min(SLOTS, len(passing)) * max(block_bytes[number] for number in passing)
    return slots + sum(size for number, size in enumerate(block_bytes) if number not in passing)


def variants(
    needs: Needs,
    link: Link,
    seconds: Callable[[int], float],
    load_seconds: float | None = None,
    batches: Sequence[int] = BATCHES,
) -> tuple[Variant, ...]:
    """What the placement may choose from, the fastest first; ``seconds`` predicts a call of so many items.

    Resident and streamed, tiled where it can be, each at the smallest batch beyond which an item gains nothing
    worth waiting for. Empty where the device cannot hold what is needed for a single item.
    """
    most = needs.most_items or max(batches)
    sizes = [batch for batch in batches if batch <= most]
    total = sum(needs.weights.values())
    if load_seconds is None:
        load_seconds = total / link.bytes_per_second
    found: list[Variant] = []
    for tiled in (False, True) if needs.tiled_bytes is not None else (False,):
        rows = [_resident(needs, link, seconds, batch, tiled, load_seconds) for batch in sizes]
        found += _worth_it([row for row in rows if row])
        rows = [_streamed(needs, link, seconds, batch, tiled) for batch in sizes]
        found += _worth_it([row for row in rows if row])
    return tuple(sorted(found, key=lambda variant: variant.option.seconds_per_item))


def _working(needs: Needs, batch: int, tiled: bool) -> int:
    item = needs.tiled_bytes if tiled and needs.tiled_bytes is not None else needs.item_working_bytes
    # Tiles are decoded one after another, each for all items of the call.
    return needs.working_bytes + item * batch


def _resident(
    needs: Needs, link: Link, seconds: Callable[[int], float], batch: int, tiled: bool, load_seconds: float
) -> Variant | None:
    working = _working(needs, batch, tiled)
    if sum(needs.weights.values()) + working > link.memory_bytes:
        return None
    each = seconds(batch) / batch * (needs.tiled_slowdown if tiled else 1.0)
    option = Option(each, batch, dict(needs.weights), working, load_seconds)
    return Variant(option, Hint("resident", batch, tiled, working))


def _streamed(needs: Needs, link: Link, seconds: Callable[[int], float], batch: int, tiled: bool) -> Variant | None:
    """A pass takes as long as its computation or its transfers, whichever is longer, and the first block's arrival."""
    working = _working(needs, batch, tiled)
    total = sum(needs.weights.values())
    core = total - sum(needs.block_bytes)
    blocks = streamed_blocks(needs.block_bytes, core, link.memory_bytes - working)
    if not blocks:
        return None
    moved = sum(needs.block_bytes[number] for number in blocks)
    first = needs.block_bytes[blocks[0]] / link.bytes_per_second
    computing = seconds(batch) * (needs.tiled_slowdown if tiled else 1.0)
    each = (max(computing, needs.passes * moved / link.bytes_per_second) + first) / batch
    kept = core + kept_bytes(needs.block_bytes, blocks)
    # The device holds a part of each component under another name: it is of no use to a resident option.
    weights = {streamed_name(name): round(kept * size / total) for name, size in needs.weights.items()}
    option = Option(each, batch, weights, working, kept / link.bytes_per_second, streamed=True)
    return Variant(option, Hint("streamed", batch, tiled, working))


def _worth_it(rows: Sequence[Variant]) -> list[Variant]:
    """Of one mode: the smallest batch that is as fast as any, nearly, and smaller ones, which need less memory."""
    best = min((row.option.seconds_per_item for row in rows), default=0.0)
    chosen: list[Variant] = []
    for row in rows:
        if not chosen or row.option.seconds_per_item < chosen[-1].option.seconds_per_item:
            chosen.append(row)
        if row.option.seconds_per_item <= best * (1 + PROFIT):
            break
    return chosen
