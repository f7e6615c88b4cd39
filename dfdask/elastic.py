"""Workers by class, as many as the work, the deadline and the budget call for: an ``Adaptive`` for any cluster.

``dfdask.scaling`` decides; ``dfdask.backends`` starts and stops. Who leaves is chosen by name, gets nothing new,
finishes what it has, hands over what it holds, and only then ends. A worker that is lost is asked for again; one
that comes late, or from somebody else, is counted when it is there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from distributed.deploy.adaptive import Adaptive
from distributed.protocol.pickle import dumps

from dfdask.backends import Backend, backend_for, class_resources
from dfdask.capacity import ways
from dfdask.errors import SpecError
from dfdask.fleets import Fleet, WorkerClass
from dfdask.placement import Option, StageWork
from dfdask.plugins import scheduler_plugins
from dfdask.scale_spec import Scale
from dfdask.scaling import PATIENCE_SECONDS, Decision, Limits, State, decide

logger = logging.getLogger("dfdask.elastic")

LOST_SECONDS = 15.0
"""For so long a worker must be gone before another one is asked for: its nanny may bring it back."""
DRAIN_SECONDS = 60.0
"""Between two looks at whether a worker that leaves has finished."""
RETRY_SECONDS = 30.0
"""Before asking again where workers could not be started."""
_LEARNING = 0.5


def adapt(
    cluster: Any,
    classes: Sequence[WorkerClass],
    *,
    deadline: float | None = None,
    budget: float | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    interval: float = 2.0,
    patience: float = PATIENCE_SECONDS,
) -> Elastic:
    """Let the cluster's workers follow the work of its dfdask jobs, from now on; ``stop()`` of the result ends it.

    ``cluster`` is a LocalCluster, SpecCluster or SSHCluster, or one of dask-jobqueue, dask-kubernetes,
    dask-cloudprovider or dask-gateway. ``options`` by class say how its workers differ, in the words of that package.
    ``deadline`` are seconds from when a cluster that had nothing to do gets work; ``budget`` is in the unit of the
    classes' prices, and counts from now. Workers leave when fewer were right for ``patience`` seconds.

    Raises SpecError and ClusterError.
    """
    names = [kind.name for kind in classes]
    if not names or len(set(names)) < len(names):
        raise SpecError(f"scale: needs classes of different names, got {names}")
    if unknown := set(options or ()) - set(names):
        raise SpecError(f"scale: options for {', '.join(sorted(unknown))}, but the classes are {', '.join(names)}")
    for what, value in (("deadline", deadline), ("budget", budget)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpecError(f"scale: {what} must be a number above 0, got {value!r}; leave it out for none")
    if budget is not None and not any(kind.price_per_hour for kind in classes):
        raise SpecError("scale: a budget needs prices, and no class has one; set price_per_hour")
    tags = {kind.name: class_resources(kind.name, kind.memory_bytes) for kind in classes}
    elastic = Elastic(backend_for(cluster, tags, options), classes, deadline, budget, interval, patience)
    with suppress(AttributeError):
        cluster._adaptive.stop()
    cluster._adaptive = elastic  # which stops with the cluster
    return elastic


def classes_of(scale: Scale) -> list[WorkerClass]:
    """The classes that a job's ``scale`` names."""
    most, least, price = scale.classes("max"), scale.classes("min"), scale.classes("price")
    return [WorkerClass(name, int(most[name]), int(least[name]), price[name]) for name in most]


def is_followed(cluster: Any) -> bool:
    """Whether ``adapt`` was called for it and goes on; what a job's ``scale`` began is no hindrance to the next."""
    follower = getattr(cluster, "_adaptive", None)
    return isinstance(follower, Elastic) and follower.state != "stopped" and not follower.of_a_job


@dataclass
class _Arrivals:
    """Of one class: when those that are not there yet were asked for, and how long it takes by experience."""

    startup_seconds: float
    asked: deque[float] = field(default_factory=deque)
    seen: dict[str, float] = field(default_factory=dict)  # name of each that came: when it was there last

    def delays(self, pending: int, now: float) -> list[float]:
        """Seconds until each is expected. Who is late is expected to take as long again."""
        while len(self.asked) > pending:
            self.asked.pop()
        while len(self.asked) < pending:
            self.asked.append(now)
        waited = [now - asked for asked in self.asked]
        return [self.startup_seconds - w if w < self.startup_seconds else max(w, 1.0) for w in waited]

    def arrived(self, names: Iterable[str], now: float) -> None:
        for name in names:
            if name not in self.seen and self.asked:
                self.startup_seconds += _LEARNING * (now - self.asked.popleft() - self.startup_seconds)
            self.seen[name] = now

    def lost(self, now: float) -> list[str]:
        gone = [name for name, last in self.seen.items() if now - last > LOST_SECONDS]
        for name in gone:
            del self.seen[name]
        return gone


class Elastic(Adaptive):
    """Adapts by class. ``decision`` is the last one, ``spent`` the cost until now, by the classes' prices."""

    def __init__(
        self,
        backend: Backend,
        classes: Sequence[WorkerClass],
        deadline: float | None,
        budget: float | None,
        interval: float,
        patience: float,
    ) -> None:
        self.backend, self.classes = backend, tuple(classes)
        self.deadline, self.budget, self.patience = deadline, budget, patience
        self.of_a_job = False  # told by a job's `scale`, not by whoever owns the cluster
        self.decision: Decision | None = None
        self.decisions: deque[tuple[float, Decision]] = deque(maxlen=1000)
        self.spent = 0.0
        self._look_seconds = interval
        self._state = State()
        self._arrivals = {kind.name: _Arrivals(kind.startup_seconds) for kind in classes}
        self._workers: dict[str, dict[str, dict[str, Any]]] = {}  # by class and address: those that are ours
        self._leaving: dict[str, tuple[str, str, asyncio.Task[None]]] = {}  # by address: its class and name
        self._tasks: set[asyncio.Task[None]] = set()
        self._going: list[tuple[str, str, str]] = []
        self._looked = self._paused = 0.0
        self._short = dict.fromkeys(self._arrivals, False)  # whose last start did not bring all that were asked for
        self._gate_is_there = False
        self._working_since: float | None = None
        super().__init__(cast(Any, backend), interval=interval, minimum=0, maximum=math.inf)

    def stop(self, reason: str = "unknown") -> None:
        super().stop(reason)
        with suppress(RuntimeError):  # the loop is closed already
            for *_, task in list(self._leaving.values()):
                self.loop.add_callback(task.cancel)

    @property
    def _ended(self) -> bool:
        return bool(self.state == "stopped")

    # -- what Adaptive asks

    async def target(self) -> int:
        """Decide, from what the gate says is left."""
        if not self._gate_is_there:  # no job may have been here yet
            for plugin in scheduler_plugins():
                await self.scheduler.register_scheduler_plugin(
                    plugin=dumps(plugin), name=plugin.name, idempotent=plugin.idempotent
                )
            self._gate_is_there = True
        answer = await self.scheduler.dfdask_forecast(classes=[kind.name for kind in self.classes])
        now = time.monotonic()
        fleet = await self._look(answer["workers"], now)
        works = [_work(entry) for entry in answer["works"]]
        if any(work.items > 0 for work in works):
            self._working_since = self._working_since or now
        elif not answer.get("jobs"):
            self._working_since = None
        limits = Limits(
            None if self.deadline is None else self.deadline - (now - (self._working_since or now)),
            None if self.budget is None else self.budget - self.spent,
            2 * self._look_seconds,
        )
        kinds = [replace(kind, startup_seconds=self._arrivals[kind.name].startup_seconds) for kind in self.classes]
        decision, self._state = await asyncio.to_thread(
            decide, works, kinds, fleet, limits, self._state, now, self.patience
        )
        if answer["wanted"] and not any(decision.counts.values()) and decision.reason == "idle":
            able = [kind for kind in self.classes if kind.maximum]
            first = min(able, key=lambda kind: kind.price_per_hour, default=None)
            if first is not None:
                decision = replace(decision, counts={**decision.counts, first.name: 1})
        await self.scheduler.dfdask_starting(starting=self._coming(decision.counts, fleet))
        if self.decision is None or decision.counts != self.decision.counts:
            self.decisions.append((time.time(), decision))
            logger.info("%s", decision.explain())
        self.decision = decision
        return sum(decision.counts.values())

    async def recommendations(self, target: int) -> dict[str, Any]:
        if self._ended:  # while the target was found: a cluster that closes would start what nobody ends
            return {"status": "same"}
        if self._missing() and time.monotonic() >= self._paused:
            return {"status": "up", "n": target}
        names = await self.workers_to_close(target)
        return {"status": "down", "workers": names} if names or any(self._surplus().values()) else {"status": "same"}

    async def workers_to_close(self, target: int) -> list[str]:
        """Names, by class: those that have least to do. Who is not there yet goes before them, unnamed."""
        self._going = []
        for kind, surplus in self._surplus().items():
            workers = [entry for entry in self._workers[kind].items() if entry[0] not in self._leaving]
            extra = surplus - self._pending(kind)
            workers.sort(key=lambda entry: (not entry[1]["idle"], entry[1]["held_tasks"]))
            self._going += [(kind, address, entry["name"]) for address, entry in workers[: max(extra, 0)]]
        return [name for *_, name in self._going]

    async def scale_up(self, n: Any) -> None:
        for kind, count in self._missing().items():
            # Starting may take minutes; looking goes on meanwhile.
            task = asyncio.create_task(self._start_workers(kind, count))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(0)  # all are asked for before anyone counts again

    async def _start_workers(self, kind: str, count: int) -> None:
        if self._ended:
            return
        wanted = self.backend.planned(kind) + count
        try:
            await self.backend.start(kind, count)
            self._short[kind] = self.backend.planned(kind) < wanted
        except Exception as error:
            self._short[kind] = True
            self._paused = time.monotonic() + RETRY_SECONDS
            logger.warning("could not start %d workers of class %s: %s", count, kind, error)

    async def scale_down(self, workers: Any) -> None:
        present = self._present()
        for kind, surplus in self._surplus().items():
            pending = min(surplus, self._pending(kind))
            if pending:
                await self.backend.stop(kind, [], pending, present)
        for kind, address, name in self._going:
            task = asyncio.create_task(self._leave(kind, address, name))
            self._leaving[address] = kind, name, task
            task.add_done_callback(partial(self._left, address))
        self._going = []

    def _left(self, address: str, task: asyncio.Task[None]) -> None:
        self._leaving.pop(address, None)
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("worker at %s could not leave: %s", address, task.exception())

    # -- what is there

    async def _look(self, workers: Mapping[str, Mapping[str, Any]], now: float) -> Fleet:
        """Take in who is there, what that costs, and who is gone."""
        hours = (now - self._looked) / 3600 if self._looked else 0.0
        self._looked = now
        own: dict[str, dict[str, dict[str, Any]]] = {kind.name: {} for kind in self.classes}
        others: dict[str, int] = {}
        for address, entry in workers.items():
            kind = self.backend.owner(str(entry["name"]))
            if kind is not None:
                own[kind][address] = {**entry, "name": str(entry["name"])}
            else:
                others[entry["class"]] = others.get(entry["class"], 0) + 1
        self._workers = own
        known = self._present() | {worker for _, worker, _ in self._leaving.values()}
        ready, starting = {}, {}
        for kind_ in self.classes:
            name, arrivals = kind_.name, self._arrivals[kind_.name]
            self.spent += hours * kind_.price_per_hour * self.backend.planned(name)
            arrivals.arrived((entry["name"] for entry in own[name].values()), now)
            gone = {*arrivals.lost(now), *self.backend.dead(name)} - known
            lost = sorted(worker for worker in gone if self.backend.owner(worker))
            if lost:
                logger.info("lost %s", ", ".join(lost))
                await self.backend.lost(name, lost, self._present())
            ready[name] = sum(address not in self._leaving for address in own[name])
            starting[name] = arrivals.delays(self._pending(name), now)
        return Fleet(ready, starting, others)

    def _present(self) -> set[str]:
        return {entry["name"] for workers in self._workers.values() for entry in workers.values()}

    def _pending(self, kind: str) -> int:
        """Asked for and not there."""
        return max(self.backend.planned(kind) - len(self._workers.get(kind, ())), 0)

    def _staying(self, kind: str) -> int:
        return self.backend.planned(kind) - sum(leaving == kind for leaving, *_ in self._leaving.values())

    def _coming(self, counts: Mapping[str, int], fleet: Fleet) -> int:
        """How many more will be there. Where the last start failed, what is wanted says nothing of that."""
        return sum(
            self._pending(kind) if self._short[kind] else max(count - fleet.ready[kind], 0)
            for kind, count in counts.items()
        )

    def _missing(self) -> dict[str, int]:
        counts = self.decision.counts if self.decision else {}
        return {kind: count - self._staying(kind) for kind, count in counts.items() if count > self._staying(kind)}

    def _surplus(self) -> dict[str, int]:
        counts = self.decision.counts if self.decision else {}
        return {kind: self._staying(kind) - count for kind, count in counts.items() if count < self._staying(kind)}

    async def _leave(self, kind: str, address: str, name: str) -> None:
        """Drain, hand over, close: exactly this one. What holds the only copy of a result stays until it is fetched."""
        while True:
            drained = await self.scheduler.dfdask_drain(workers=[address], timeout=DRAIN_SECONDS)
            if address in drained:
                retired = await self.scheduler.retire_workers(
                    workers=[address], remove=True, close_workers=self.backend.closes_by_itself
                )
                if address in retired:
                    break
            workers = (await self.scheduler.dfdask_forecast())["workers"]
            if address not in workers:
                break  # it died; nothing to hand over
            await asyncio.sleep(self._look_seconds)
        self._arrivals[kind].seen.pop(name, None)
        *_, task = self._leaving.pop(address)
        self._tasks.add(task)  # from here on the backend does not count it either
        await self.backend.stop(kind, [name], 0, self._present() - {name})


def _work(entry: Mapping[str, Any]) -> StageWork:
    whole, least = entry.get("bytes", (0, 0))
    options = {
        kind: ways(Option(float(seconds), weights={"": whole}), {"": least}, kind)
        for kind, seconds in entry["seconds_per_item"].items()
    }
    return StageWork(entry["job"], entry["stage"], float(entry["items"]), options, float(entry.get("weight", 1.0)))
