"""What workers do: run one stage over a micro-batch, write one shard."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import get_worker, secede
from distributed.diagnostics.plugin import WorkerPlugin

import dfdask.wire  # noqa: F401  registers how micro-batches travel
from dfdask.errors import ClusterError, DfdaskError, StorageError
from dfdask.items import Item
from dfdask.stages.batch import Batch, describe, is_out_of_memory, run_batch
from dfdask.stages.model import ModelRef
from dfdask.stages.residency import held_stage
from dfdask.store import RunStore
from dfdask.targets import Location

if TYPE_CHECKING:
    from dfdask.stages.check import Inspected

OK, FAILED = 1, 2  # values of the status array

_importing = threading.Lock()


class Preload(WorkerPlugin):
    """Imports torch and the pipeline's classes while the worker waits for its first task."""

    name = "dfdask-preload"

    def setup(self, worker: Any) -> None:
        threading.Thread(target=_import_heavy, daemon=True, name="dfdask-preload").start()


def _import_heavy() -> None:
    with _importing:  # diffusers breaks when two threads are the first to import it
        from dfdask.stages import cut

        cut.import_libraries()


async def inspect_here(ref: ModelRef, samples: list[Item]) -> Inspected | DfdaskError:
    """``inspect_model`` on this worker, beside what it computes. Returns the SpecError or ModelError."""

    def inspect() -> Inspected | DfdaskError:
        with _importing:
            from dfdask.stages.check import inspect_model

            try:
                return inspect_model(ref, samples)
            except DfdaskError as error:
                return error

    return await asyncio.to_thread(inspect)


def run_stage(ref: ModelRef, stage: str, work: Batch | Sequence[Item]) -> Batch:
    """Run ``stage`` over a micro-batch; items enter at the first stage. See ``Batch.problem`` for what goes wrong."""
    batch = work if isinstance(work, Batch) else Batch.start(work)
    if batch.problem is not None:
        return batch
    try:
        with _importing:
            held = held_stage(ref, stage)
        started = time.time()
        result = run_batch(stage, held, batch)
    except DfdaskError as error:
        return Batch((), problem=error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Batch((), problem=_too_little_memory(stage, batch, error))
    items = sum(len(group.items) for group in batch.groups)
    _tell({"stage": stage, "items": items, "start": started, "seconds": result.seconds[stage]})
    return result


def write_shard(location: Location, shard: int, run: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    """Write the pixels of one shard and commit it, beside the computation of the next.

    Returns a receipt: ``shard``, ``items``, ``failed_items``, ``stale`` (another writer was first),
    ``stage_seconds``; or ``shard`` and ``error``, a DfdaskError for the client to raise.
    """
    for batch in batches:
        if batch.problem is not None:
            return {"shard": shard, "error": batch.problem}
    secede()  # frees the compute thread
    try:
        store = RunStore.open(location)
        return _write(store, shard, run, batches)
    except StorageError as error:
        return {"shard": shard, "error": error}


def _write(store: RunStore, shard: int, run: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    layout = store.layout
    first = shard * layout.shard_items
    count = min(layout.shard_items, layout.items - first)
    pixels = np.zeros((count, *layout.item_shape), np.uint8)
    status = np.zeros(count, np.uint8)
    errors = [""] * count
    seconds: dict[str, float] = {}
    for batch in batches:
        for stage, spent in batch.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        for row, text in batch.failures.items():
            status[row - first], errors[row - first] = FAILED, text
        for group in batch.groups:
            for item, picture in zip(group.items, group.state, strict=True):
                row = item.index - first
                problem = _place(pixels[row], picture)
                status[row], errors[row] = (FAILED, problem) if problem else (OK, "")
    record = {"stage_seconds": seconds, "worker": get_worker().name, "written": time.time(), **run}
    commit = store.write_shard(shard, pixels, status, errors, record)
    return {
        "shard": shard,
        "items": count,
        "failed_items": int((status == FAILED).sum()),
        "stale": commit.stale,
        "stage_seconds": seconds,
        "worker": str(get_worker().name),
    }


def _place(room: np.ndarray[Any, np.dtype[np.uint8]], picture: Any) -> str:
    """Copy one item's pixels into its row; smaller ones leave black at the right and below. Returns a problem."""
    if isinstance(picture, Exception):
        return f"decode: {type(picture).__name__}: {picture}"
    if len(picture.shape) != len(room.shape) or any(
        have > fits for have, fits in zip(picture.shape, room.shape, strict=True)
    ):
        return f"decode: the picture has shape {picture.shape}, the run has room for {room.shape}"
    room[tuple(slice(0, size) for size in picture.shape)] = picture
    return ""


def _too_little_memory(stage: str, batch: Batch, error: Exception) -> ClusterError:
    most = max(len(group.items) for group in batch.groups)
    return ClusterError(
        f"{stage}: worker {get_worker().name} has too little memory for {most} items at once ({describe(error)}); "
        "set a smaller `batch` and start a new run, or give this stage to larger workers"
    )


def _tell(metadata: dict[str, Any]) -> None:
    """Leave telemetry where it travels to the scheduler with the task's own completion message."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    if task is not None:
        task.metadata["dfdask"] = metadata
