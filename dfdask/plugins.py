"""What dfdask adds to a scheduler."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dfdask.gate import Gate


def scheduler_plugins() -> list[Any]:
    """The gate, and the page and metrics that show it. Those are a face: they are named here, not imported."""
    return [Gate(), import_module("dfdask.dashboard").Dashboard()]
