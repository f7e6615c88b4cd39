"""A job on a fleet in virtual time: the gate's rules and the controller's decisions without a cluster."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dfdask.controller import Controller, Decision, JobFacts
from dfdask.dispatch import Dispatcher, Kind, Seat
from dfdask.placement import Device

Seconds = Callable[[Kind, int, str, float], float]
"""True seconds of an item: (kind, number of the item, device class, now)."""
Decide = Callable[[Controller, float], Decision]


@dataclass
class Outcome:
    """Seconds until the last item was done, when each one was, and what workers did with their time."""

    seconds: float = 0.0
    done: list[float] = field(default_factory=list)
    busy_seconds: dict[str, float] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    loads: int = 0
    decisions: list[tuple[float, Decision]] = field(default_factory=list)


class Simulation:
    """Runs jobs whose items are all there at the start, or at their ``arrivals``."""

    def __init__(
        self,
        jobs: Sequence[JobFacts],
        devices: Sequence[Device],
        seconds: Seconds,
        decide: Decide | None = None,
        depth: int = 2,
        tick_seconds: float = 0.5,
        arrivals: Mapping[str, Sequence[float]] | None = None,
        restart_seconds: float = 0.0,
    ) -> None:
        """``restart_seconds``: what a change of own roles costs, and all weights with it; the first is free."""
        self._seconds, self._tick, self._restart = seconds, tick_seconds, restart_seconds
        self._decide: Decide = decide or (lambda controller, _: controller.decide())
        self._jobs = {job.name: job for job in jobs}
        self._facts = {(job.name, stage.name): stage for job in jobs for stage in job.stages}
        self._following = {
            (job.name, a.name): (job.name, b.name) for job in jobs for a, b in itertools.pairwise(job.stages)
        }
        self._order = {(job.name, stage.name): -place for job in jobs for place, stage in enumerate(job.stages)}
        self._dispatcher, self.controller = Dispatcher(depth), Controller()
        self._devices = {device.name: device for device in devices}
        self._holds: dict[str, dict[str, int]] = {device.name: dict.fromkeys(device.holds, 0) for device in devices}
        self._queue: dict[str, list[tuple[Hashable, Kind]]] = {device.name: [] for device in devices}
        self._busy: dict[str, bool] = dict.fromkeys(self._devices, False)
        self._roles: dict[str, Seat] = dict.fromkeys(self._devices, Seat())
        self._restarts: set[str] = set()
        self._batches: dict[Hashable, range] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._arrivals = arrivals or {}
        self.now = 0.0
        self.outcome = Outcome(
            busy_seconds=dict.fromkeys(self._devices, 0.0), load_seconds=dict.fromkeys(self._devices, 0.0)
        )

    def run(self, limit_seconds: float = 1e7) -> Outcome:
        for device in self._devices.values():
            self.controller.add_device(device)
            self._dispatcher.join(device.name, Seat())
        for kind, following in self._following.items():
            self._dispatcher.follow(kind, following, self._facts[kind].ahead_items)
        left = 0
        for job in self._jobs.values():
            self.controller.add_job(job)
            times = self._arrivals.get(job.name, ())
            for start in range(0, job.items, job.batch):
                items = range(start, min(start + job.batch, job.items))
                left += len(items)
                when = times[items[-1]] if times else 0.0
                self._at(when, partial(self._ready, (job.name, job.stages[0].name), items))
        self._at(0.0, self._decide_again)
        while self._events and len(self.outcome.done) < left:
            self.now, _, act = heapq.heappop(self._events)
            if self.now > limit_seconds:
                raise RuntimeError(f"{len(self.outcome.done)} of {left} items are done after {self.now} s")
            act()
            if not self._events or self._events[0][0] > self.now:
                self._assign()
        self.outcome.seconds = self.now
        return self.outcome

    def busy_seconds(self, worker: str) -> float:
        """What the worker has computed by now, up to the end of the task that it is at."""
        return self.outcome.busy_seconds[worker]

    def waiting_tasks(self, kind: Kind) -> int:
        """Tasks that are ready and not with a worker."""
        return -(-self._dispatcher.ready_items(kind) // self._jobs[kind[0]].batch)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), act))

    def _ready(self, kind: Kind, items: range) -> None:
        key = (*kind, items.start)
        self._batches[key] = items
        self._dispatcher.push(kind, (self._order[kind], items.start), key, len(items))

    def _decide_again(self) -> None:
        self._decide_once()
        self._at(self.now + self._tick, self._decide_again)

    def _decide_once(self) -> None:
        decision = self._decide(self.controller, self.now)
        for name, seat in decision.seats.items():
            self._dispatcher.seat(name, seat)
            before, self._roles[name] = self._roles[name], seat
            if self._restart and before.own and seat.own and before.own != seat.own:
                self._restarts.add(name)
            if seat.own and not self._busy[name]:
                self._prepare(name, seat.own[0])
        if decision.seats:
            self.outcome.decisions.append((self.now, decision))

    def _prepare(self, worker: str, kind: Kind) -> None:
        """Load the first of a worker's own stages while it has nothing to do."""
        seconds = self._load(worker, kind)
        if seconds:
            self._busy[worker] = True
            self.outcome.load_seconds[worker] += seconds
            self._at(self.now + seconds, lambda: self._prepared(worker))

    def _prepared(self, worker: str) -> None:
        self._busy[worker] = False
        self._begin(worker)

    def _assign(self) -> None:
        for assignment in self._dispatcher.assign(lambda key: {}):
            self._queue[assignment.worker].append((assignment.key, assignment.kind))
            if not self._busy[assignment.worker]:
                self._begin(assignment.worker)

    def _begin(self, worker: str) -> None:
        if not self._queue[worker]:
            return
        key, kind = self._queue[worker].pop(0)
        items = self._batches[key]
        loading = self._load(worker, kind)
        name = self._devices[worker].device_class
        seconds = sum(self._seconds(kind, item, name, self.now) for item in items)
        self._busy[worker] = True
        self.outcome.busy_seconds[worker] += seconds
        self.outcome.load_seconds[worker] += loading
        self._at(self.now + loading + seconds, lambda: self._end(worker, key, kind, items, seconds))

    def _end(self, worker: str, key: Hashable, kind: Kind, items: range, seconds: float) -> None:
        self._busy[worker] = False
        self._dispatcher.done(key, finished=True)
        self.controller.finished(kind, len(items), worker, seconds)
        before = next((one for one, following in self._following.items() if following == kind), None)
        if before is not None:
            self._dispatcher.used(before, len(items))
        following = self._following.get(kind)
        if following is None:
            self.outcome.done += [self.now] * len(items)
        else:
            self._ready(following, items)
        if self.controller.left(kind) == 0:
            self._at(self.now, self._decide_once)
        self._begin(worker)

    def _load(self, worker: str, kind: Kind) -> float:
        """Bring a stage's components to the device; the ones that were used longest ago make room."""
        facts, device, held = self._facts[kind], self._devices[worker], self._holds[worker]
        restart = 0.0
        if worker in self._restarts and kind in (self._roles[worker].own or ()):  # what it was given before is done
            self._restarts.remove(worker)
            restart = self._restart
            held.clear()
        missing = sum(size for name, size in facts.weights.items() if name not in held)
        for name in facts.weights:
            held.pop(name, None)
        sizes = {name: size for stage in self._facts.values() for name, size in stage.weights.items()}
        while held and sum(sizes[name] for name in held) + sum(facts.weights.values()) > device.memory_bytes:
            del held[next(iter(held))]
        held.update(dict.fromkeys(facts.weights, 0))
        self.controller.holds(worker, frozenset(held))
        if not missing:
            return restart
        self.outcome.loads += 1
        load = facts.load_seconds.get(device.device_class, 0.0) * missing / sum(facts.weights.values())
        return restart + load
