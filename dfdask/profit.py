"""Batching by measured profit: how many items a stage runs at once, found while it does its work. Pure.

A large batch fills a device better, and a small one leaves it more room for weights: which wins is measured, not
guessed. From the largest batch down, half of it is tried as long as that has made an item faster.
"""

from __future__ import annotations

from collections import deque
from statistics import median

PROFIT = 0.02
"""The part of its time that an item must save for a larger batch to be worth its memory and its wait."""
_KEPT = 7


class BatchSearch:
    """The search of one stage for one kind of call."""

    def __init__(self) -> None:
        self._item_seconds: dict[int, deque[float]] = {}
        self._begun: set[int] = set()

    def observe(self, items: int, seconds: float) -> None:
        """A call of so many items took ``seconds``; 0 where nobody knows. The first of a size only warms it up."""
        if seconds <= 0:
            return
        if items in self._begun:
            self._item_seconds.setdefault(items, deque(maxlen=_KEPT)).append(seconds / items)
        self._begun.add(items)

    def next_items(self, most: int) -> int:
        """How many of ``most`` items to run at once: a size that is to be tried, or the best that was."""
        size = most
        while size > 1:
            half = (size + 1) // 2
            for tried in (size, half):
                if tried not in self._item_seconds:
                    return tried
            if median(self._item_seconds[half]) > median(self._item_seconds[size]) * (1 - PROFIT):
                return size
            size = half
        return size
