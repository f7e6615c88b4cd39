"""What can be watched while a job runs: frozen values, handed to observers.

An observer that raises never stops a job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["preparing", "running", "stopping", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Where the items of one stage are: ``queued`` at the gate, ``running`` on workers, ``done``."""

    name: str
    queued: int
    running: int
    done: int
    workers: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of a job.

    ``items`` counts the rows of the output; ``committed_items`` those that the store holds, of which
    ``resumed_items`` were there before this process started and ``failed_items`` carry an error.
    ``items_per_second`` and ``eta_seconds`` are None until the first commit of this process.
    """

    run: str
    output: str
    phase: Phase
    items: int
    committed_items: int
    resumed_items: int
    failed_items: int
    shards: int
    committed_shards: int
    elapsed_seconds: float
    items_per_second: float | None
    eta_seconds: float | None
    stages: tuple[StageProgress, ...]
    workers: int
    dashboard: str | None


@dataclass(frozen=True, slots=True)
class ShardCommitted:
    """One shard is safe in the store. ``stale`` means that another writer had committed it first."""

    shard: int
    items: int
    failed_items: int
    worker: str
    stage_seconds: dict[str, float]
    stale: bool
