"""Which stages this process holds, ready to run. Loaded once, at first use, off the event loop."""

from __future__ import annotations

import os
import threading

from dfdask.stages.batch import Stage
from dfdask.stages.fake import FakeDevice, FakeStage
from dfdask.stages.model import ModelRef

_held: dict[tuple[str, str], Stage] = {}
_lock = threading.Lock()
_fake_device: FakeDevice | None = None
DEVICE_CLASS = "DFDASK_DEVICE_CLASS"
MEMORY_BYTES = "DFDASK_MEMORY_BYTES"
"""Environment variables that say what this process's device is and how much of its memory it may use."""


def held_stage(ref: ModelRef, name: str) -> Stage:
    """The stage ``name`` of a model, loaded if it is not here yet. Raises ModelError."""
    key = (repr(ref), name)
    with _lock:
        if key not in _held:
            _held[key] = _load(ref, name)
        return _held[key]


def _load(ref: ModelRef, name: str) -> Stage:
    if ref.fake is not None:
        global _fake_device
        if _fake_device is None:
            memory = os.environ.get(MEMORY_BYTES)
            _fake_device = FakeDevice(os.environ.get(DEVICE_CLASS, "cpu"), int(memory) if memory else None)
        return FakeStage(name, ref.fake, _fake_device)
    from dfdask.stages.cut import PipelineStage

    return PipelineStage(ref, name)
