"""Stages that sleep: the cost, the memory, the handoffs and the failures of real ones, for tests, demos, simulation."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfdask.items import Item
from dfdask.spec import FakeStages
from dfdask.stages.batch import Rows


class FakeDevice:
    """A device with room for so many bytes of weights: what was used longest ago makes room for what is missing."""

    def __init__(self, device_class: str, memory_bytes: int | None) -> None:
        self.device_class = device_class
        self._memory_bytes = memory_bytes
        self.held: dict[str, int] = {}

    def bring(self, component: str, size_bytes: int, load_seconds: float) -> None:
        """Have ``component`` on the device, which takes ``load_seconds`` unless it is there."""
        if component in self.held:
            self.held[component] = self.held.pop(component)
            return
        if self._memory_bytes is not None:
            while self.held and sum(self.held.values()) + size_bytes > self._memory_bytes:
                del self.held[next(iter(self.held))]
        time.sleep(load_seconds)
        self.held[component] = size_bytes


class FakeStage:
    """Sleeps its seconds per item, hands on its bytes; the last one draws pixels that the seed determines."""

    def __init__(self, name: str, settings: FakeStages, device: FakeDevice | None = None) -> None:
        self._name = name
        self._settings = settings
        self._device = device or FakeDevice("cpu", None)
        self._last = name == list(settings.stages)[-1]

    def prepare(self) -> None:
        """Bring the weights to the device."""
        size = self._settings.weights.get(self._name, 0)
        if size or self._settings.load_seconds:
            self._device.bring(fake_component(self._settings, self._name), size, self._settings.load_seconds)

    def holds(self) -> list[str]:
        """The components on the device now."""
        return list(self._device.held)

    def run(self, items: Sequence[Item], state: Any) -> Any:
        seconds = sum(map(self._seconds, items)) * self._settings.speeds.get(self._device.device_class, 1.0)
        if seconds:
            time.sleep(seconds)
        if self._name == self._settings.fail_stage:
            if any(item.id in self._settings.kill for item in items):
                os.kill(os.getpid(), signal.SIGKILL)
            bad = [item.id for item in items if item.id in self._settings.fail]
            mended = self._settings.fail_until is not None and os.path.exists(self._settings.fail_until)
            if bad and not mended:
                raise RuntimeError(f"fake failure of {', '.join(bad)}")
        if self._last:
            return [fake_pixels(item.seed, self._settings.height, self._settings.width) for item in items]
        return Rows(np.zeros((len(items), self._settings.handoff_bytes), np.uint8))

    def _seconds(self, item: Item) -> float:
        shift = self._settings.shift
        if shift is not None and item.index >= shift.at and self._name in shift.stages:
            return shift.stages[self._name]
        return self._settings.stages[self._name]


def fake_component(settings: FakeStages, stage: str) -> str:
    """The name of a stage's component, the same for equal settings only."""
    import hashlib

    return f"fake-{hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]}/{stage}"


def fake_pixels(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 noise of shape (height, width, 3) by a multiplicative hash (Knuth) of the seed and the place."""
    places = np.arange(height * width * 3, dtype=np.uint64) + np.uint64(seed)
    hashed = (places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)
    return hashed.astype(np.uint8).reshape(height, width, 3)
