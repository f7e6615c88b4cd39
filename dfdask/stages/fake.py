"""Stages that sleep: the cost, the handoffs and the failures of real ones, for tests, demos and simulation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfdask.items import Item
from dfdask.spec import FakeStages
from dfdask.stages.batch import Rows


class FakeStage:
    """Sleeps its seconds per item, hands on its bytes; the last one draws pixels that the seed determines."""

    def __init__(self, name: str, settings: FakeStages) -> None:
        self._name = name
        self._settings = settings
        self._last = name == list(settings.stages)[-1]

    def run(self, items: Sequence[Item], state: Any) -> Any:
        seconds = self._settings.stages[self._name] * len(items)
        if seconds:
            time.sleep(seconds)
        if self._name == self._settings.fail_stage:
            bad = [item.id for item in items if item.id in self._settings.fail]
            if bad:
                raise RuntimeError(f"fake failure of {', '.join(bad)}")
        if self._last:
            return [fake_pixels(item.seed, self._settings.height, self._settings.width) for item in items]
        return Rows(np.zeros((len(items), self._settings.handoff_bytes), np.uint8))


def fake_pixels(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 noise of shape (height, width, 3) by a multiplicative hash (Knuth) of the seed and the place."""
    places = np.arange(height * width * 3, dtype=np.uint64) + np.uint64(seed)
    hashed = (places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)
    return hashed.astype(np.uint8).reshape(height, width, 3)
