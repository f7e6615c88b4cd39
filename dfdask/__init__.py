"""Bulk image and video generation with diffusers pipelines on a Dask cluster.

``run = dfdask.submit("jobs/quickstart.yaml")`` or ``dfdask.submit(model=..., prompts=...)`` starts a job,
``run.wait()`` waits for it and ``run.dataset()`` opens what it made with xarray.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfdask.errors import (
        ClusterError,
        DfdaskError,
        JobStopped,
        ModelError,
        PromptError,
        RunChangedError,
        RunNotFoundError,
        SpecError,
        StorageError,
    )
    from dfdask.events import Progress, ShardCommitted, StageProgress
    from dfdask.run import Run, open_run, submit
    from dfdask.spec import JobSpec

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "DfdaskError",
    "JobSpec",
    "JobStopped",
    "ModelError",
    "Progress",
    "PromptError",
    "Run",
    "RunChangedError",
    "RunNotFoundError",
    "ShardCommitted",
    "SpecError",
    "StageProgress",
    "StorageError",
    "__version__",
    "open_run",
    "submit",
]

_HOMES = {
    "JobSpec": "spec",
    "Progress": "events",
    "Run": "run",
    "ShardCommitted": "events",
    "StageProgress": "events",
    "open_run": "run",
    "submit": "run",
}  # every other public name is an error


def __getattr__(name: str) -> Any:
    """Import what is asked for only then, so that ``import dfdask`` stays instant."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dfdask.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    if "IPython" in sys.modules:
        importlib.import_module("dfdask.notebook").register()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
