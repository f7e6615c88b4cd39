"""Which stages this process holds, ready to run. Loaded once, at first use, off the event loop."""

from __future__ import annotations

import threading

from dfdask.stages.batch import Stage
from dfdask.stages.fake import FakeStage
from dfdask.stages.model import ModelRef

_held: dict[tuple[str, str], Stage] = {}
_lock = threading.Lock()


def held_stage(ref: ModelRef, name: str) -> Stage:
    """The stage ``name`` of a model, loaded if it is not here yet. Raises ModelError."""
    key = (repr(ref), name)
    with _lock:
        if key not in _held:
            _held[key] = _load(ref, name)
        return _held[key]


def _load(ref: ModelRef, name: str) -> Stage:
    if ref.fake is not None:
        return FakeStage(name, ref.fake)
    from dfdask.stages.cut import PipelineStage

    return PipelineStage(ref, name)
