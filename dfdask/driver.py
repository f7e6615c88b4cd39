"""Stream a job through the cluster: a bounded window of shards, each a chain of stage tasks and one write.

The driver keeps no state that matters: what is done is what the store says.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dfdask.wire  # noqa: F401  registers how micro-batches travel
from dfdask.batching import shard_range
from dfdask.controller import ANY_CLASS
from dfdask.errors import ClusterError, DfdaskError, JobStopped, StorageError
from dfdask.events import JobEnded, ShardCommitted
from dfdask.graph import Graph
from dfdask.plugins import scheduler_plugins
from dfdask.prompts import ItemTable
from dfdask.stage_tasks import nearly_done
from dfdask.stages.model import ModelRef
from dfdask.store import RunStore
from dfdask.words import size
from dfdask.worker import Preload, inspect_here, receipt_of

if TYPE_CHECKING:
    from distributed import Client, Future

    from dfdask.items import Item
    from dfdask.stages.check import Inspected
    from dfdask.targets import Location

logger = logging.getLogger("dfdask")
POLL_SECONDS = 0.5
RESULT_SECONDS = 2.0  # for the few bytes that say that a shard is written
EVENTS_SECONDS = 10.0  # between two looks at what happened on the cluster
PATIENCE_SECONDS = 60.0  # without a worker for a stage
SILENCE_SECONDS = 3.0  # of waiting for the first worker
OTHERS_SECONDS = 5.0  # between two looks at what another process has committed
LOST_SECONDS = 15.0  # without an answer from the scheduler
LOAD_BYTES_PER_SECOND = 2e9  # from a warm file to a device
UNWRITABLE = "its output cannot be written"
STOP_SECONDS = 10.0  # that running shards get to finish in when the job is stopped


@dataclass(frozen=True, slots=True)
class Work:
    """All that a driver needs to know of a job. ``token`` names the run in task keys.

    ``cost_key`` is what its costs are learnt by; ``weights`` are the bytes of each stage's components, ``streamed``
    those that stay where they are streamed; ``priority`` is its part of the workers' time in relation to other jobs.
    ``replaced`` names the writers of commits that are there and are to be replaced, by shard.
    """

    ref: ModelRef
    stages: tuple[str, ...]
    store: RunStore
    table: ItemTable
    batch: int
    shards: tuple[int, ...]
    token: str
    provenance: dict[str, Any]
    cost_key: str
    weights: Mapping[str, Mapping[str, int]]
    streamed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    priority: float = 1.0
    replaced: Mapping[int, str] = field(default_factory=dict)


class Driver:
    """Runs ``work`` on the cluster of ``client``; call ``run`` in a thread of its own."""

    def __init__(
        self,
        client: Client,
        work: Work,
        on_commit: Callable[[ShardCommitted], None],
        on_cluster: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        is_paused: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._work = work
        self._on_commit = on_commit
        self._on_cluster = on_cluster
        self._should_stop = should_stop
        self._is_paused = is_paused
        self._finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._flying: dict[Future[Any], int] = {}  # micro-batches of the shard that each receipt stands for
        self._window = 1
        self._next_event = 0
        self._events_taken = 0.0
        self._answered = self._hopeful = time.monotonic()
        self._polled = 0.0
        self._others_seen: float | None = None  # when it was last looked what other processes have committed

    def run(self) -> None:
        """Return when every shard is committed.

        Raises JobStopped, StorageError (the output cannot be written), ModelError (a worker cannot load its
        stage) or ClusterError (the scheduler is gone, no worker for a stage, a stage that keeps dying).
        """
        todo = deque(self._work.shards)
        reason = "failed"
        try:
            equip(self._client, self._work.ref)
            self._announce()
            self._poll()
            self._submit(todo)
            while self._flying or todo:
                if self._should_stop():
                    self._stop(todo)
                    break
                self._collect(POLL_SECONDS)
                self._poll()
                self._leave_to_others(todo)
                self._submit(todo)
            reason = "finished"
        except JobStopped:
            reason = "stopped"
            raise
        except StorageError:
            reason = UNWRITABLE
            raise
        except OSError:  # a connection broke in the middle of a call; nothing here reads or writes files
            raise _lost() from None
        finally:
            self._take_leave(reason)
            for future in self._flying:
                future.release()
            self._flying.clear()

    def _submit(self, shards: deque[int]) -> None:
        """Fill the window, all new shards in one graph; nothing while the job is paused."""
        if self._is_paused():
            return
        flying = sum(self._flying.values())
        graph = Graph(self._work)
        while shards and (flying < self._window or len(self._flying) + len(graph.receipts) < 2):
            flying += graph.add(shards.popleft())
        if graph.receipts:
            futures = self._client.get(graph.build(), list(graph.receipts), sync=False)
            for future, size in zip(futures, graph.receipts.values(), strict=True):
                self._flying[future] = size
                future.add_done_callback(self._finished.put)

    def _leave_to_others(self, todo: deque[int]) -> None:
        """Once another process is seen to work on the same run: what it has committed is not done again.

        The rest is done in another order, for the other began at the same end.
        """
        now = time.monotonic()
        if self._others_seen is None or now - self._others_seen < OTHERS_SECONDS or not todo:
            return
        with contextlib.suppress(StorageError):  # then it is found out when the shard is written
            there = self._work.store.committed() - self._work.replaced.keys()
            for shard in [shard for shard in todo if shard in there]:
                todo.remove(shard)
                if record := self._work.store.commit(shard):
                    self._on_commit(ShardCommitted(**receipt_of(record, stale=True)))
            if not self._others_seen:
                random.shuffle(todo)
        self._others_seen = now

    def _collect(self, timeout_seconds: float) -> None:
        """Take in what has finished, waiting at most so long for the first."""
        late = []
        try:
            future = self._finished.get(timeout=timeout_seconds)
            while True:
                try:
                    self._receive(future)
                except TimeoutError:
                    late.append(future)
                future = self._finished.get_nowait()
        except queue.Empty:
            for future in late:
                future.add_done_callback(self._finished.put)

    def _receive(self, future: Future[Any]) -> None:
        """Raises TimeoutError where its worker was lost with the result: Dask computes it once more."""
        if future not in self._flying:  # dropped since
            return
        if future.status == "finished":
            receipt: dict[str, Any] = future.result(timeout=RESULT_SECONDS)
            del self._flying[future]
            future.release()
            if "error" in receipt:
                raise receipt["error"]
            if receipt["stale"] and self._others_seen is None:
                self._others_seen = 0.0
            self._on_commit(ShardCommitted(**receipt))
        elif future.status == "error":
            raise _explained(future.exception())
        else:
            raise _lost()

    def _poll(self) -> None:
        """Ask the gate how things are; raise ClusterError when nobody has answered or could work for long."""
        now = time.monotonic()
        if now - self._polled < POLL_SECONDS:
            return
        self._polled = now
        try:
            state = self._ask("dfdask_progress", run=self._work.token)
            if now - self._events_taken > EVENTS_SECONDS:
                self._keep_events()
        except (OSError, TimeoutError, AttributeError):
            if now - self._answered > LOST_SECONDS or self._client.status == "closed":
                raise _lost() from None
            return
        self._answered = now
        self._window = int(state["window"])
        missing = [name for name in self._work.stages if name in state["unserved"] or not state["workers"]]
        state["unserved"] = missing
        if not missing or state["starting"]:
            self._hopeful = now
        elif now - self._hopeful > PATIENCE_SECONDS:
            address = self._client.scheduler.address if self._client.scheduler else "SCHEDULER"
            raise ClusterError(
                f"no workers for {', '.join(map(self._with_size, missing))} in {PATIENCE_SECONDS:.0f} s; start one "
                f"with: dfdask worker {address} --stages {','.join(missing)}"
            )
        self._on_cluster(state)

    def _with_size(self, stage: str) -> str:
        """The stage and the memory that its weights take of a device at least."""
        least = sum((self._work.streamed.get(stage) or self._work.weights.get(stage, {})).values())
        return f"{stage} ({size(least)} of weights at least)" if least else stage

    def _ask(self, handler: str, **arguments: Any) -> Any:
        """What the gate answers."""
        call = getattr(self._client.scheduler, handler)
        return self._client.sync(call, **arguments, callback_timeout=LOST_SECONDS)

    def _announce(self) -> None:
        """Tell the gate what is about to be submitted."""
        work, layout = self._work, self._work.store.layout
        left = sum(len(shard_range(shard, layout.shard_items, layout.items)) for shard in work.shards)
        stages = [
            {
                "name": stage,
                "weights": dict(work.weights.get(stage, {})),
                "load_seconds": {ANY_CLASS: _load_seconds(work, stage)},
                "streamed": dict(work.streamed.get(stage, {})),
            }
            for stage in work.stages
        ]
        self._next_event = self._ask(
            "dfdask_start_job",
            client=self._client.id,
            job={
                "run": work.token,
                "ref": pickle.dumps(work.ref),
                # What all items cost is taken to be what the first one costs, until tasks tell.
                "sample": pickle.dumps((work.ref, work.table.items(0, 1)[0])) if work.ref.fake is None else None,
                "name": work.store.location.name,
                "output": str(work.store.location),
                "model": work.cost_key,
                "stages": stages,
                "items": layout.items,
                "items_left": left,
                "committed_items": layout.items - left,
                "failed_items": 0,
                "batch": work.batch,
                "weight": work.priority,
            },
        )

    def _keep_events(self) -> None:
        """Save beside the data what happened on the cluster since the last look."""
        self._events_taken = time.monotonic()
        found = self._ask("dfdask_events", number=self._next_event, run=self._work.token)
        self._next_event = found["next"]
        if found["events"]:
            self._work.store.append_events(found["events"])

    def _take_leave(self, reason: str) -> None:
        """Close the books of the job. What cannot be said or saved any more is no loss to the data."""
        with contextlib.suppress(OSError, TimeoutError, AttributeError, StorageError):
            if self._client.status == "running":
                self._ask("dfdask_end_job", run=self._work.token, reason=reason, client=self._client.id)
                if reason != UNWRITABLE:
                    self._keep_events()
                return
        if reason != UNWRITABLE:  # nobody else is left to say it to those who watch the run
            end = JobEnded(time.time(), self._work.token, reason, self._work.store.layout.items)
            self._work.store.append_events([end.as_dict()])

    def _stop(self, todo: deque[int]) -> None:
        """Let the shards that are nearly done finish, drop the rest. Raises JobStopped where there is any."""
        nearly = set(self._client.run_on_scheduler(nearly_done, keys=[future.key for future in self._flying]))
        dropped = [future for future in self._flying if future.key not in nearly]
        for future in dropped:
            del self._flying[future]
            future.release()
        deadline = time.monotonic() + STOP_SECONDS
        while self._flying and time.monotonic() < deadline:
            self._collect(min(POLL_SECONDS, STOP_SECONDS))
            self._poll()
        if dropped or self._flying or todo:
            raise JobStopped("stopped on request; everything committed is kept")


def equip(client: Client, ref: ModelRef) -> None:
    """Have the gate on the scheduler, and workers that load before their first task."""
    for plugin in scheduler_plugins():
        client.register_plugin(plugin, name=plugin.name)
    client.register_plugin(Preload(imports=ref.fake is None))


def inspect_on_worker(client: Client, ref: ModelRef, samples: list[Item]) -> Inspected:
    """``inspect_model`` on any worker: the client needs neither torch nor the time to import it.

    Raises SpecError, ModelError, and ClusterError where there is no worker and none is started.
    """
    equip(client, ref)
    while True:
        address = _a_worker(client)
        try:
            found: Inspected | DfdaskError = client.run(inspect_here, ref, samples, workers=[address])[address]
        except OSError:  # that worker went away
            time.sleep(POLL_SECONDS)
            continue
        if isinstance(found, DfdaskError):
            raise found
        return found


def _a_worker(client: Client) -> str:
    """The address of one, which is waited for. Raises ClusterError."""
    scheduler: Any = client.scheduler
    began = hopeful = time.monotonic()
    silent = True
    try:
        while not (workers := client.scheduler_info(n_workers=1)["workers"]):
            starting, now = client.sync(scheduler.dfdask_want_worker), time.monotonic()
            if starting:
                hopeful = now
            advice = f"start one with: dfdask worker {scheduler.address}"
            if silent and now - began > SILENCE_SECONDS:
                silent = False
                logger.warning("no workers yet; %s", f"{starting} starting" if starting else advice)
            if now - hopeful > PATIENCE_SECONDS:
                raise ClusterError(f"no workers in {now - began:.0f} s; {advice}")
            time.sleep(POLL_SECONDS)
    except (OSError, TimeoutError):
        raise _lost() from None
    return str(next(iter(workers)))


def _load_seconds(work: Work, stage: str) -> float:
    """A first guess at how long it takes to bring a stage's weights to a device; tasks will tell."""
    if work.ref.fake is not None:
        return work.ref.fake.load_seconds
    return sum(work.weights.get(stage, {}).values()) / LOAD_BYTES_PER_SECOND


def token_for(fingerprint: str, place: Location) -> str:
    """The same for the same run: tasks of an earlier client that still run are taken over, not done twice."""
    import hashlib

    where = f"{place.endpoint or ''}\n{place.root}/{place.name}"  # two servers may have buckets of the same name
    return hashlib.sha256(f"{fingerprint}\n{where}".encode()).hexdigest()[:8]


def _explained(error: BaseException | None) -> DfdaskError:
    if isinstance(error, DfdaskError):
        return error
    name = type(error).__name__
    text = " ".join(str(error).split())[:500]
    if name == "KilledWorker":
        return ClusterError(f"a task kept killing its worker processes ({text}); look at the workers' logs")
    if name in ("FutureCancelledError", "CancelledError"):
        return _lost()
    return ClusterError(f"a worker failed: {name}: {text}")


def _lost() -> ClusterError:
    return ClusterError("the scheduler went away; start it again, then run the same command to go on")


def missing_shards(count: int, committed: Sequence[int] | set[int]) -> tuple[int, ...]:
    """The shards that have no commit yet, in order."""
    done = set(committed)
    return tuple(shard for shard in range(count) if shard not in done)
