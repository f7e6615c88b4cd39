"""The gate: a scheduler plugin that holds ready stage tasks back and places each on a worker of its role.

Stage tasks ask for the resource ``stage:<name>``, which no worker offers, so that Dask leaves them in its
"no-worker" state. The gate assigns them, at most ``depth`` per worker, so that the inputs of the next task arrive
while the current one runs. A worker's roles are its resources ``role:<stage>``; one without any runs all stages.
Tasks of ``WRITE`` run beside computation and are placed where most of their bytes are.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler, TaskState, WorkerState

NAME = "dfdask-gate"
STAGE = "stage:"
ROLE = "role:"
WRITE = "write"
ANY_STAGE: frozenset[str] = frozenset()


def stage_resource(stage: str) -> dict[str, float]:
    """The resource that tasks of ``stage`` ask for and only the gate can satisfy."""
    return {STAGE + stage: 1}


def role_resources(stages: Iterable[str]) -> dict[str, float]:
    """The resources that tag a worker with these roles."""
    return {ROLE + stage: 1 for stage in stages}


def task_key(stage: str, run: str, shard: int, index: int, items: int) -> tuple[str, int, int, int]:
    """Dask's dashboard groups tasks by the first part; ``progress`` counts items by the last."""
    return (f"{stage}-{run}", shard, index, items)


class Gate(SchedulerPlugin):
    """Places stage tasks. One serves all jobs of a cluster."""

    name = NAME
    idempotent = True

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        self.seconds = 0.0
        self._roles: dict[str, frozenset[str]] = {}
        self._assigned: dict[str, set[Any]] = {}
        # Workers of one role set by how many tasks they hold: a free one is found without a walk over all.
        self._free: dict[frozenset[str], list[dict[str, None]]] = {}
        self._ready: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._placed: dict[Any, tuple[str, str]] = {}
        self._done: dict[str, Counter[str]] = defaultdict(Counter)
        self._counted: set[Any] = set()  # tasks of _done that Dask still knows: it may compute them again
        self._pump_is_due = False

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        scheduler.handlers["dfdask_progress"] = self.progress
        for address in scheduler.workers:
            self.add_worker(scheduler, address)
        for key, task in scheduler.tasks.items():
            if task.state == "no-worker":
                self.transition(key, "waiting", "no-worker")

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        tags = scheduler.workers[worker].resources
        roles = frozenset(tag.removeprefix(ROLE) for tag, amount in tags.items() if amount and tag.startswith(ROLE))
        self.remove_worker(scheduler, worker)
        self._roles[worker] = roles
        self._assigned[worker] = set()
        levels = self._free.setdefault(roles, [{} for _ in range(self.depth + 1)])
        levels[0][worker] = None
        self._wake()

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        roles = self._roles.pop(worker, None)
        if roles is not None:
            level = min(len(self._assigned.pop(worker)), self.depth)
            self._free[roles][level].pop(worker, None)

    def log_event(self, topic: str, msg: Any) -> None:
        # The only word of a worker that has begun or gone on to run: it is not among the running when it is added.
        if isinstance(msg, dict) and msg.get("action") == "worker-status-change":
            self._wake()

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        started = time.thread_time()
        if finish == "forgotten":
            self._counted.discard(key)
        if finish == "no-worker":
            task = self._scheduler.tasks[key]
            stage = _stage_of(task)
            if stage is not None:
                heapq.heappush(self._ready[stage], (task.priority, key))
                self._wake()
        elif start == "processing" and key in self._placed:
            address, stage = self._placed.pop(key)
            self._release(address, key)
            known = self._scheduler.tasks.get(key)
            if known is not None:
                # Dask may compute it again later: then it must come through the gate, not to a dead address.
                known.worker_restrictions = None
                known.resource_restrictions = stage_resource(stage)
            if finish == "memory" and key not in self._counted:
                self._counted.add(key)
                run = key[0].removeprefix(f"{stage}-")
                self._done[run][stage] += key[3]
            self._wake()
        self.seconds += time.thread_time() - started

    def progress(self, run: str) -> dict[str, Any]:
        """Items of ``run`` by stage: queued at the gate, running (assigned), done; and workers by role."""
        queued: Counter[str] = Counter()
        running: Counter[str] = Counter()
        tasks = self._scheduler.tasks
        for stage, heap in self._ready.items():
            keys = {key for _, key in heap if key[0] == f"{stage}-{run}"}
            # A heap keeps what was cancelled until its turn comes.
            queued[stage] = sum(key[3] for key in keys if key in tasks and tasks[key].state == "no-worker")
        for key, (_, stage) in self._placed.items():
            if key[0] == f"{stage}-{run}":
                running[stage] += key[3]
        roles = Counter(role for roles in self._roles.values() for role in roles)
        untagged = sum(not roles for roles in self._roles.values())
        return {
            "queued": dict(queued),
            "running": dict(running),
            "done": dict(self._done[run]),
            "roles": dict(roles),
            "any": untagged,
            "workers": len(self._roles),
            "gate_seconds": self.seconds,
        }

    def _wake(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        started = time.thread_time()
        self._pump_is_due = False
        chosen: dict[Any, str] = {}
        waiting = [stage for stage, heap in self._ready.items() if heap]
        # The smallest Dask priority goes first, so later stages drain before earlier ones fill memory.
        for stage in sorted(waiting, key=lambda name: self._ready[name][0][0]):
            heap = self._ready[stage]
            while heap:
                task = self._scheduler.tasks.get(heap[0][1])
                if task is None or task.state != "no-worker" or task.key in chosen:
                    heapq.heappop(heap)
                    continue
                address = self._home(task) if stage == WRITE else self._free_worker(stage, task)
                if address is None:
                    break
                heapq.heappop(heap)
                self._assign(task, stage, address)
                chosen[task.key] = "processing"
        self.seconds += time.thread_time() - started
        if chosen:
            # Dask takes recommendations from the end, so the first chosen comes last.
            recommendations = dict(reversed(chosen.items()))
            self._scheduler.transitions(recommendations, stimulus_id=f"dfdask-gate-{time.time()}")

    def _assign(self, task: TaskState, stage: str, address: str) -> None:
        task.resource_restrictions = {}
        task.worker_restrictions = {address}
        self._placed[task.key] = (address, stage)
        if stage != WRITE:
            held = self._assigned[address]
            self._move(address, len(held), len(held) + 1)
            held.add(task.key)

    def _release(self, address: str, key: Any) -> None:
        held = self._assigned.get(address)
        if held is not None and key in held:
            self._move(address, len(held), len(held) - 1)
            held.discard(key)

    def _move(self, address: str, before: int, after: int) -> None:
        levels = self._free[self._roles[address]]
        levels[min(before, self.depth)].pop(address, None)
        levels[min(after, self.depth)][address] = None

    def _free_worker(self, stage: str, task: TaskState) -> str | None:
        """The least loaded worker of the role; among equals the one that holds most input bytes."""
        able = [roles for roles in self._free if not roles or stage in roles]
        able.sort(key=lambda roles: len(roles) or 1 << 30)  # specialists first
        running = self._scheduler.running
        holders = _bytes_by_worker(task)
        for level in range(self.depth):
            for holder in sorted(holders, key=lambda name: -holders[name]):
                held_roles = self._roles.get(holder)
                if held_roles is None or held_roles not in able or holder not in self._free[held_roles][level]:
                    continue
                if self._scheduler.workers[holder] in running:
                    return holder
            for roles in able:
                for address in self._free[roles][level]:
                    worker = self._scheduler.workers.get(address)
                    if worker is not None and worker in running:
                        return address
        return None

    def _home(self, task: TaskState) -> str | None:
        """Where most of the task's input bytes are; a worker of another choice only if that one is gone."""
        holders = _bytes_by_worker(task)
        running: set[WorkerState] = self._scheduler.running
        able = {worker.address for worker in running}
        best = max((name for name in holders if name in able), key=holders.__getitem__, default=None)
        return best if best is not None else next(iter(able), None)


def _stage_of(task: TaskState) -> str | None:
    for resource in task.resource_restrictions or ():
        if resource.startswith(STAGE):
            return str(resource.removeprefix(STAGE))
    return None


def _bytes_by_worker(task: TaskState) -> Mapping[str, int]:
    totals: dict[str, int] = {}
    for dependency in task.dependencies:
        for worker in dependency.who_has or ():
            totals[worker.address] = totals.get(worker.address, 0) + max(dependency.nbytes, 1)
    return totals
