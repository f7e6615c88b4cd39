"""What workers do: run one stage over a micro-batch, write one shard."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from distributed import get_worker, secede
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.system import MEMORY_LIMIT

import dfdask.wire  # noqa: F401  registers how micro-batches travel
from dfdask import meters
from dfdask.errors import ClusterError, DfdaskError, StorageError
from dfdask.first_costs import COUNT
from dfdask.gate import BEGAN
from dfdask.items import Item
from dfdask.quarantine import KILLS_TO_BLAME
from dfdask.stages.batch import Batch, Stage, describe, is_out_of_memory, run_batch
from dfdask.stages.budget import HOST_MEMORY_BYTES, HOST_PART, MEMORY_BYTES, allow
from dfdask.stages.model import ModelRef
from dfdask.stages.residency import DEVICE_CLASS, held_stage, loaded_here
from dfdask.store import RunStore
from dfdask.tags import COMPUTE, read_tags
from dfdask.targets import Location
from dfdask.telemetry import TELEMETRY
from dfdask.warm_up import WARM_UP

if TYPE_CHECKING:
    from dfdask.stages.check import Inspected

OK, FAILED = 1, 2  # values of the status array
BEGAN_SECONDS = 0.05
"""Dask gathers messages for 2 ms; what an item's worker said of it must be out before the item can kill it."""
THUMBNAILS = 4
THUMBNAIL_PIXELS = 96

_importing = threading.Lock()
_computing: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
"""By worker: before one that has just come offers ``compute``, it may get a stage task for each of its threads."""


class Preload(WorkerPlugin):
    """Has the worker load before its first task: stages when the gate says so, and with ``imports`` the libraries."""

    def __init__(self, imports: bool = True) -> None:
        self._imports = imports
        self.name = "dfdask-preload" if imports else "dfdask-warm-up"  # neither takes the other's place

    async def setup(self, worker: Any) -> None:
        if COMPUTE not in worker.state.total_resources:
            with suppress(OSError):  # the scheduler is gone: whoever has work for this worker sees that too
                await worker.set_resources(**{COMPUTE: 1})
        if self._imports:
            threading.Thread(target=_import_heavy, daemon=True, name="dfdask-preload").start()

        async def warm_up(ref: bytes, stage: str) -> dict[str, Any] | None:
            return await asyncio.to_thread(_warm_up, worker, ref, stage)

        async def count(sample: bytes) -> dict[str, Any]:
            return await asyncio.to_thread(_count, sample)

        worker.handlers.update({WARM_UP: warm_up, COUNT: count})


def _warm_up(worker: Any, ref: bytes, stage: str) -> dict[str, Any] | None:
    """Have a stage's weights where they are computed with, unless there is something to do, or they cannot be."""
    with _importing:
        began = time.perf_counter()
        if worker.state.executing_count or worker.state.ready or worker.state.in_flight_tasks_count:
            return None
        try:
            held, came = _ready(pickle.loads(ref), stage, worker)
        except DfdaskError:  # its first task will say so; Dask would write a traceback here
            return None
    return {"seconds": time.perf_counter() - began if came else 0.0, "holds": _holds(held) or []}


def _count(sample: bytes) -> dict[str, Any]:
    """By stage, what an item has to do; none where that cannot be counted. Raises ModelError."""
    with _importing:
        from dfdask.stages.profile import stage_profiles
    ref, item = pickle.loads(sample)
    profiles = stage_profiles(ref, item, _importing)
    return {stage: asdict(profile.item_work) for stage, profile in profiles.items() if not profile.problem}


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


def run_stage(
    ref: ModelRef, stage: str, work: Batch | Sequence[Item], location: Location | None = None, shard: int = 0
) -> Batch:
    """Run ``stage`` over a micro-batch; items enter at the first stage. See ``Batch.problem`` for what goes wrong.

    Where Dask asks for it once more, because a worker died, and ``shard`` is in the store at ``location`` by now,
    nothing is computed.
    """
    batch = work if isinstance(work, Batch) else Batch.start(work)
    if batch.problem is not None or batch.committed:
        return batch
    note = _note()
    if note.get("again") and location is not None and _is_committed(location, shard):
        _tell({"items": 0})
        return Batch((), committed=True)
    if note.get("give_up"):
        return Batch((), problem=ClusterError(f"{stage}: workers keep dying here; look at their logs"))
    if note.get("poison"):
        batch = batch.without(note["poison"], f"{stage}: given up: its worker died {KILLS_TO_BLAME} times")
    try:
        with _computing.setdefault(get_worker(), threading.Lock()):
            with _importing:
                asked = time.perf_counter()
                held, came = _ready(ref, stage, get_worker())
                # Looking whether all is there takes time too, which says nothing of what a load takes.
                load_seconds = time.perf_counter() - asked if came else 0.0
            started = time.time()
            if note.get("careful"):
                held, batch = _Announcing(held), batch.in_single_items()
            result = run_batch(stage, held, batch)
    except DfdaskError as error:
        return Batch((), problem=error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Batch((), problem=_too_little_memory(stage, batch, error))
    seconds, items = result.seconds[stage], sum(len(group.items) for group in result.groups)
    meters.stage_done(stage, sum(len(group.items) for group in batch.groups), seconds, load_seconds)
    told: dict[str, Any] = {"start": started, "seconds": seconds, "load_seconds": load_seconds, "items": items}
    if (holds := _holds(held)) is not None:
        told["holds"] = holds
    facts = getattr(held, "facts", None)
    if facts is not None:
        told["facts"] = facts()
    _tell(told)
    return result


def _is_committed(location: Location, shard: int) -> bool:
    try:
        return RunStore.open(location).commit(shard) is not None
    except StorageError:  # to be said when the shard is written
        return False


def _ready(ref: ModelRef, stage: str, worker: Any) -> tuple[Stage, bool]:
    """The stage with its weights where they are computed with, and whether any had to come there."""
    tags = read_tags(worker.state.total_resources)
    os.environ.setdefault(DEVICE_CLASS, tags.device_class)
    if tags.memory_bytes is not None:
        allow(MEMORY_BYTES, tags.memory_bytes)
    allow(HOST_MEMORY_BYTES, _host_bytes(worker))
    before = loaded_here()
    held = held_stage(ref, stage)
    prepare = getattr(held, "prepare", None)
    if prepare is not None:
        prepare()
    return held, loaded_here() != before


def _host_bytes(worker: Any) -> int:
    """What weights may take of the host's memory, as far as this process may use it.

    With a limit of its own Dask spills at 0.6 of that, pauses the worker at 0.8 and ends it at 0.95.
    """
    limit = worker.memory_manager.memory_limit
    return limit // 2 if limit else int(MEMORY_LIMIT * HOST_PART)


def _holds(held: Stage) -> list[str] | None:
    """The components on its device, where it knows."""
    holds = getattr(held, "holds", None)
    return sorted(holds()) if holds is not None else None


class _Announcing:
    """A stage that says which item it begins, so that one that kills this process is known by name."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def run(self, items: Sequence[Item], state: Any) -> Any:
        worker = get_worker()
        if len(items) == 1:
            worker.log_event(BEGAN, {"key": worker.get_current_task(), "item": items[0].index})
            time.sleep(BEGAN_SECONDS)
        return self._stage.run(items, state)


def write_shard(
    location: Location, shard: int, run: dict[str, Any], batches: Sequence[Batch], replaced: str = ""
) -> dict[str, Any]:
    """Write the pixels of one shard and commit it, beside the computation of the next.

    ``replaced`` is the writer of a commit that this one replaces, if any.

    Returns a receipt: ``shard``, ``items``, ``failed_items``, ``stale`` (another writer was first),
    ``stage_seconds``; or ``shard`` and ``error``, a DfdaskError for the client to raise.
    """
    for batch in batches:
        if batch.problem is not None:
            return {"shard": shard, "error": batch.problem}
    secede()  # frees the compute thread
    try:
        store = RunStore.open(location)
        if any(batch.committed for batch in batches) and (record := store.commit(shard)):
            return receipt_of(record, stale=True)  # who wrote it did not live to say so
        return _write(store, shard, run, batches, replaced)
    except StorageError as error:
        return {"shard": shard, "error": error}


def _write(store: RunStore, shard: int, run: dict[str, Any], batches: Sequence[Batch], replaced: str) -> dict[str, Any]:
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
    commit = store.write_shard(shard, pixels, status, errors, record, replaced)
    failed = [text for text in errors if text]
    counts = {"start": first, "stop": first + count, "failed": int((status == FAILED).sum())}
    receipt = receipt_of({**record, "shard": shard, **counts}, commit.stale)
    written = {name: receipt[name] for name in ("shard", "items", "failed_items")}
    _tell({**written, "errors": tuple(failed[:THUMBNAILS]), "thumbnails": _thumbnails(first, pixels, status)})
    return receipt


def receipt_of(record: Mapping[str, Any], stale: bool) -> dict[str, Any]:
    """What the client is told of a shard, by the record of its commit."""
    return {
        "shard": record["shard"],
        "items": record["stop"] - record["start"],
        "failed_items": record["failed"],
        "stale": stale,
        "stage_seconds": record.get("stage_seconds", {}),
        "worker": str(record.get("worker", "")),
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


def _thumbnails(first: int, pixels: np.ndarray[Any, Any], status: np.ndarray[Any, Any]) -> dict[int, bytes]:
    """Small JPEG pictures of a few good items, by row; of a video its middle frame."""
    import io

    from PIL import Image

    good = np.flatnonzero(status == OK)
    found = {}
    for place in good[:: max(len(good) // THUMBNAILS, 1)][:THUMBNAILS]:
        picture = pixels[place] if pixels.ndim == 4 else pixels[place, pixels.shape[1] // 2]
        image, data = Image.fromarray(picture), io.BytesIO()
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        image.save(data, "JPEG", quality=80)
        found[first + int(place)] = data.getvalue()
    return found


def _note() -> dict[str, Any]:
    """What the gate says about the present task."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    return dict((task.annotations or {}).get(TELEMETRY) or {}) if task is not None else {}


def _tell(metadata: dict[str, Any]) -> None:
    """Leave telemetry where it travels to the scheduler with the task's own completion message."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    if task is not None:
        task.metadata[TELEMETRY] = metadata
