"""The arguments for one call of a pipeline with several items."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from dfdask.batching import is_batchable
from dfdask.images import Picture
from dfdask.items import Item


def pipeline_call(pipeline: Any, items: Sequence[Item]) -> dict[str, Any]:
    """The keyword arguments for one call with all ``items``.

    Texts are lists; so are pictures where there are several items, as PIL images. Each item has a CPU generator.
    """
    import torch

    accepted = inspect.signature(pipeline.__call__).parameters
    call: dict[str, Any] = {name: opened(value) for name, value in items[0].arguments.items()}
    for name, value in items[0].arguments.items():
        if is_batchable(name, value) and not (isinstance(value, Picture) and len(items) == 1):
            call[name] = [opened(item.arguments[name]) for item in items]
    if "prompt" in accepted:
        call["prompt"] = [item.prompt for item in items]
    elif "batch_size" in accepted:
        call["batch_size"] = len(items)
    call["generator"] = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
    return {**call, "output_type": "np", "return_dict": False}


def opened(value: Any) -> Any:
    """``value`` with pictures as PIL images."""
    if isinstance(value, Picture):
        return value.open()
    return [opened(entry) for entry in value] if isinstance(value, list) else value
