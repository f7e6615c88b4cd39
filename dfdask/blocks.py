"""Which of a component's blocks pass through a device that cannot hold them all, and what stays there. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

SLOTS = 2
"""Blocks that have room on the device while they are streamed: one computes, one arrives."""
LARGEST_PART = 8
"""A block of more than one part in so many is streamed by the blocks inside it."""
_STREAMED = " (streamed)"


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
    return component + _STREAMED


def is_held(component: str, holds: Collection[str]) -> bool:
    """Whether a device that has these has what is needed: whole is more than streamed."""
    return component in holds or component.removesuffix(_STREAMED) in holds


def kept_bytes(block_bytes: Sequence[int], streamed: Sequence[int]) -> int:
    """Device bytes of a component's blocks where some are streamed: the others and the slots."""
    if not streamed:
        return sum(block_bytes)
    passing = set(streamed)
    slots = min(SLOTS, len(passing)) * max(block_bytes[number] for number in passing)
    return slots + sum(size for number, size in enumerate(block_bytes) if number not in passing)
