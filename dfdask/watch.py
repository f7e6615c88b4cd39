"""A run as others see it: from its store, and from the scheduler where one is named. Nothing here takes part in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dfdask.errors import ClusterError
from dfdask.events import Phase, Progress, StageProgress
from dfdask.store import RunStore
from dfdask.words import ENDED, duration

POLL_SECONDS = 1.0
STORE_SECONDS = 5.0  # between looks at the store
AGAIN_SECONDS = 30.0  # a run that was stopped is watched for so long: it may be about to go on
RATE_SECONDS = 120.0  # the speed is that of the commits of so long
SILENT_SECONDS, SILENT_GAPS = 60.0, 10  # no commit for so long, and for so many times what one took of late
_RECENT = 20  # commits that tell what one takes of late
_TIMEOUT_SECONDS = 5.0


class StoreWatch:
    """A run's progress by its commits alone. Only what is new is read."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._commits: dict[int, tuple[int, int, float]] = {}  # items, failed items, time of writing
        self._looked = 0.0
        self._quiet = True  # nothing was new at the last look
        self._end: Mapping[str, Any] | None = None

    def progress(self, now: float) -> tuple[Progress, str]:
        """A snapshot, and when the last commit was. Raises StorageError."""
        if now - self._looked >= STORE_SECONDS:
            self._looked = now
            end = self._store.last_end() if self._quiet else None  # asked first: what was committed before is seen
            new = self._store.committed() - self._commits.keys()
            self._quiet = not new
            self._end = end if end and self._quiet and end["reason"] != "finished" else None
            for shard in new:
                if record := self._store.commit(shard):
                    items = int(record["stop"]) - int(record["start"])
                    self._commits[shard] = items, int(record["failed"]), float(record.get("written", 0.0))
        times = sorted((written, items) for items, _, written in self._commits.values() if written)
        complete = len(self._commits) == self._store.layout.shards
        silent = not complete and _silent(times, now)
        return self._snapshot(now, times, complete, silent), self._remark(now, silent)

    def _snapshot(self, now: float, times: list[tuple[float, int]], complete: bool, silent: bool) -> Progress:
        """``times``: when how many items were committed, in order."""
        layout = self._store.layout
        done = sum(items for items, _, _ in self._commits.values())
        phase: Phase = "finished" if complete else "running"
        if self._end and not complete:
            phase = "stopped" if self._end["reason"] == "stopped" else "failed"
        rate = None if complete or silent else _rate(times, now)
        return Progress(
            run=self._store.location.name,
            output=str(self._store.location),
            phase=phase,
            items=layout.items,
            committed_items=done,
            resumed_items=0,
            failed_items=sum(failed for _, failed, _ in self._commits.values()),
            shards=layout.shards,
            committed_shards=len(self._commits),
            elapsed_seconds=max((times[-1][0] if complete else now) - times[0][0], 0.0) if times else 0.0,
            items_per_second=rate,
            eta_seconds=(layout.items - done) / rate if rate else None,
            stages=(),
            workers=0,
            dashboard=None,
        )

    def _remark(self, now: float, silent: bool) -> str:
        if not self._commits:
            return "nothing is committed yet"
        last = max(written for _, _, written in self._commits.values())
        ago = f"last commit {duration(max(now - last, 0.0))} ago"
        if self._end:
            return f"{ago}; the same command goes on"
        return f"{ago}; its client may be gone: the same command goes on" if silent else ago


def _silent(times: list[tuple[float, int]], now: float) -> bool:
    """Whether nothing has come for so long that nobody may be at work any more: a killed client says no goodbye."""
    recent = [when for when, _ in times[-_RECENT:]]
    if len(recent) < 2:
        return False
    gap = (recent[-1] - recent[0]) / (len(recent) - 1)
    return now - recent[-1] > max(SILENT_SECONDS, SILENT_GAPS * gap)


def _rate(times: list[tuple[float, int]], now: float) -> float | None:
    """Items a second of the last commits, None where there are none or they say nothing yet."""
    recent = [(when, items) for when, items in times if when > now - RATE_SECONDS]
    if len(recent) < 2:
        return None
    seconds = now - recent[0][0]
    return sum(items for _, items in recent[1:]) / seconds if seconds > 0 else None


def states(store: RunStore, scheduler: str | None) -> Iterator[tuple[Progress, str]]:
    """The run every second until it is complete, or was stopped and does not go on soon; with its stages where
    ``scheduler`` works on it.

    Raises StorageError, ClusterError.
    """
    watched, token = StoreWatch(store), ""
    if scheduler:
        from dfdask.driver import token_for

        cluster_state(scheduler)  # raises where there is none
        token = token_for(store.attributes["dfdask"]["fingerprint"], store.location)
    ended_at = None
    while True:
        progress, remark = watched.progress(time.time())
        if scheduler and progress.phase != "finished":
            try:
                progress, remark = joined(progress, remark, cluster_state(scheduler), token)
            except ClusterError:
                remark = "the scheduler does not answer"
        ended_at = (ended_at or time.monotonic()) if progress.phase in ENDED else None
        yield progress, remark
        waited = time.monotonic() - ended_at if ended_at else 0.0
        if progress.phase == "finished" or waited > AGAIN_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def joined(progress: Progress, remark: str, state: Mapping[str, Any], token: str) -> tuple[Progress, str]:
    """``progress`` with what the cluster's ``state`` (a ClusterState as a dict) says of the same run."""
    from dataclasses import replace

    job = next((job for job in state["jobs"] if job["run"] == token), None)
    if job is None:
        said, *advice = remark.split("; ")
        remark = "; ".join([f"{said}, not on this scheduler", *advice])
        return replace(progress, workers=len(state["workers"])), remark
    stages = tuple(
        StageProgress(stage["name"], stage["queued"], stage["running"], stage["done"], stage["workers"])
        for stage in job["stages"]
    )
    forecast = job["forecast_seconds"]
    return replace(
        progress,
        phase="running",
        stages=stages,
        workers=len(state["workers"]),
        elapsed_seconds=max(state["when"] - job["started"], 0.0),
        eta_seconds=progress.eta_seconds if forecast is None else forecast,
    ), ""


def cluster_state(address: str) -> dict[str, Any]:
    """The scheduler's ClusterState, as a dict. Raises ClusterError."""
    return asyncio.run(_ask(address))


async def _ask(address: str) -> dict[str, Any]:
    from distributed.core import rpc

    from dfdask.cluster import check_scheduler

    await check_scheduler(address)
    scheduler: Any = rpc(address, timeout=_TIMEOUT_SECONDS)
    try:
        answer = await asyncio.wait_for(scheduler.dfdask_state(), _TIMEOUT_SECONDS)
    except (OSError, TimeoutError, AttributeError):
        answer = None
    finally:
        await scheduler.close_rpc()
    if not isinstance(answer, dict) or "jobs" not in answer:
        raise ClusterError(f"scheduler: {address} knows of no dfdask job; start one there, or leave --scheduler out")
    return answer
