"""Which ready task goes to which worker next: the gate's rules without Dask and without a clock.

A worker has roles: stages of its own, and stages that it helps with when nothing of its own is ready. One that
cannot hold all its own stages takes turns: it keeps to one until nothing of that is left to do. Jobs share workers
by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): the job that got the least for its weight is next.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Kind = tuple[str, str]
"""A job and one of its stages."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What a worker may run; with ``turns`` one of its ``own`` at a time. ``None`` as own means everything."""

    own: tuple[Kind, ...] | None = None
    helps: tuple[Kind, ...] = ()
    turns: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task and the worker it goes to."""

    key: Hashable
    kind: Kind
    worker: str


class Dispatcher:
    """Ready tasks by kind, and workers by what they may run now and how much they have to do.

    Workers of the same abilities are kept by load: finding one does not take longer in a large fleet. A task that is
    suspected of killing workers runs ``alone``: on a worker that was kept free for it, so that no other is blamed.
    """

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        self._seats: dict[str, Seat] = {}
        self._turn: dict[str, Kind | None] = {}
        self._held: dict[str, dict[Hashable, None]] = {}
        self._paused: set[str] = set()
        self._turners: dict[str, None] = {}
        self._idle_turners: dict[str, None] = {}
        self._alone: set[Hashable] = set()
        self._kept_for: dict[str, Hashable] = {}  # workers that get nothing but this task
        self._free: dict[_Ability, list[dict[str, None]]] = {}
        self._ready: dict[Kind, list[tuple[Any, Hashable]]] = defaultdict(list)
        self._queued: dict[Hashable, tuple[Kind, int]] = {}
        self._ready_items: dict[Kind, int] = defaultdict(int)
        self._placed: dict[Hashable, tuple[Kind, int, str]] = {}
        self._running_items: dict[Kind, int] = defaultdict(int)
        self._stock: dict[Kind, int] = defaultdict(int)
        self._next: dict[Kind, Kind] = {}
        self._before: dict[Kind, Kind] = {}
        self._limits: dict[Kind, float] = {}
        self._item_cost: dict[Kind, float] = {}
        self._served: dict[str, float] = {}

    # -- workers

    def join(self, worker: str, seat: Seat) -> None:
        """A worker came, or came back without anything."""
        self.leave(worker)
        self._seats[worker], self._turn[worker], self._held[worker] = seat, None, {}
        self._shelve(worker)

    def leave(self, worker: str) -> list[Hashable]:
        """A worker went; the tasks that it held are returned, and not placed any more."""
        if worker not in self._seats:
            return []
        self._unshelve(worker)
        self._paused.discard(worker)
        self._kept_for.pop(worker, None)
        lost = list(self._held.pop(worker))
        for key in lost:
            kind, items, _ = self._placed.pop(key)
            self._running_items[kind] -= items
            self._alone.discard(key)
        del self._seats[worker], self._turn[worker]
        return lost

    def seat(self, worker: str, seat: Seat) -> None:
        """Other roles; what is placed already stays where it is."""
        if self._seats[worker] != seat:
            self._unshelve(worker)
            self._seats[worker] = seat
            if not seat.turns or self._turn[worker] not in (seat.own or ()):
                self._turn[worker] = None
            self._shelve(worker)

    def pause(self, worker: str, paused: bool = True) -> None:
        """Give it nothing new until it goes on."""
        if worker in self._seats and paused != (worker in self._paused):
            self._unshelve(worker)
            (self._paused.add if paused else self._paused.discard)(worker)
            self._shelve(worker)

    def turn(self, worker: str) -> Kind | None:
        """The stage that a worker which takes turns is at."""
        return self._turn[worker]

    def held(self, worker: str) -> tuple[Hashable, ...]:
        """The tasks that a worker has, in the order in which they were placed."""
        return tuple(self._held.get(worker, ()))

    def is_blocked(self, worker: str) -> bool:
        """Whether something of the worker's own is ready that may not start: too many results wait."""
        kinds = self._ready_items if (own := self._seats[worker].own) is None else own
        return any(self._ready_items.get(kind, 0) > 0 and self.allowed_items(kind) <= 0 for kind in kinds)

    # -- tasks

    def follow(self, kind: Kind, following: Kind, limit_items: float = math.inf) -> None:
        """Results of ``kind`` wait for ``following``: at most ``limit_items``, running ones included."""
        self._next[kind], self._before[following], self._limits[kind] = following, kind, limit_items

    def weigh(self, kind: Kind, cost: float) -> None:
        """What an item of ``kind`` counts for in its job's fair share: its seconds over the job's weight."""
        self._item_cost[kind] = cost

    def push(self, kind: Kind, order: Any, key: Hashable, items: int, alone: bool = False) -> None:
        """A task is ready; smaller ``order`` goes first. ``alone``: no other on its worker beside it."""
        if key not in self._queued:
            self._catch_up(kind[0])
            self._queued[key] = kind, items
            self._ready_items[kind] += items
            heapq.heappush(self._ready[kind], (order, key))
            if alone:
                self._alone.add(key)

    def drop(self, key: Hashable) -> None:
        """A task that was ready is not any more."""
        if key in self._queued:
            kind, items = self._queued.pop(key)
            self._ready_items[kind] -= items
            self._not_alone(key)

    def forget(self, job: str) -> None:
        """A job ended: nothing of it is ready or running any more."""
        counts: list[dict[Kind, Any]] = [self._ready, self._ready_items, self._running_items, self._stock]
        for table in (*counts, self._next, self._before, self._limits, self._item_cost):
            for kind in [kind for kind in table if kind[0] == job]:
                del table[kind]
        self._served.pop(job, None)

    def done(self, key: Hashable, finished: bool) -> None:
        """A placed task left its worker. ``finished``: with a result that waits for the next stage."""
        if key in self._placed:
            kind, items, worker = self._placed.pop(key)
            self._running_items[kind] -= items
            self._unshelve(worker)
            self._held[worker].pop(key, None)
            self._shelve(worker)
            self._not_alone(key)
            if finished and kind in self._next:
                self._stock[kind] += items

    def used(self, kind: Kind, items: int) -> None:
        """Results of ``kind`` do not wait any more: the next stage has done with them, or nobody wants them."""
        self._stock[kind] = max(self._stock[kind] - items, 0)

    def ready_items(self, kind: Kind) -> int:
        return self._ready_items[kind]

    def running_items(self, kind: Kind) -> int:
        """Items of tasks that are assigned to workers."""
        return self._running_items[kind]

    def limit_items(self, kind: Kind) -> float:
        """How many results of ``kind`` may wait."""
        return self._limits.get(kind, math.inf)

    def has_work(self, job: str) -> bool:
        """Whether anything of ``job`` is ready or assigned."""
        kinds = (kind for kind in self._ready_items if kind[0] == job)
        return any(self._ready_items[kind] or self._running_items[kind] for kind in kinds)

    def allowed_items(self, kind: Kind) -> float:
        """How many items may start now without too many results waiting."""
        return self._limits.get(kind, math.inf) - self._stock[kind] - self._running_items[kind]

    def startable_items(self, kind: Kind) -> float:
        """Ready items that may start."""
        return min(self._ready_items[kind], max(self.allowed_items(kind), 0))

    # -- the rule

    def assign(self, holders: Callable[[Hashable], Mapping[str, int]]) -> list[Assignment]:
        """Place what can be placed; ``holders`` says how many bytes of a task's inputs each worker has.

        The smallest order goes first, so that later stages drain before earlier ones fill memory. Workers serve
        their own stages before they help with others; the least loaded come first, and among them the ones that
        hold most of the inputs.
        """
        self._let_go()
        found = self._round(holders, own=True)
        while self._change_turns() or self._feed():
            found += self._round(holders, own=True)
        return found + self._round(holders, own=False)

    def _round(self, holders: Callable[[Hashable], Mapping[str, int]], own: bool) -> list[Assignment]:
        found = []
        waiting: dict[str, list[tuple[Any, Kind, list[_Ability]]]] = defaultdict(list)
        with_room = [ability for ability, levels in self._free.items() if any(levels[: self.depth])]
        for kind, heap in self._ready.items():
            key = self._peek(heap)
            able = [ability for ability in with_room if (ability.owns(kind) if own else kind in ability.helps)]
            if key is not None and (able or key in self._alone):
                if own and (feeder := self._feeder(kind)) is not None:
                    able = [ability for ability in able if not ability.owns(feeder)]
                # Those with the fewest abilities first: others are left for what only they can do.
                able.sort(key=_Ability.breadth)
                waiting[kind[0]].append((heap[0][0], kind, able))
        for kinds in waiting.values():
            kinds.sort(key=lambda entry: entry[0], reverse=True)
        while waiting:
            job = min(waiting, key=lambda name: self._served.get(name, 0.0))
            _, kind, able = waiting[job][-1]
            if (placed := self._place_first(kind, able, holders)) is not None:
                found.append(placed)
            else:
                waiting[job].pop()
                if not waiting[job]:
                    del waiting[job]
        return found

    def _place_first(
        self, kind: Kind, able: Iterable[_Ability], holders: Callable[[Hashable], Mapping[str, int]]
    ) -> Assignment | None:
        """Place the first ready task of ``kind``; None where it must wait."""
        key = self._peek(self._ready[kind])
        if key is None or not self._may_start(kind, self._queued[key][1]):
            return None
        worker = self._emptied_for(key, able) if key in self._alone else self._least_loaded(able, holders(key))
        if worker is None:
            return None
        heapq.heappop(self._ready[kind])
        self._served[kind[0]] = self._served.get(kind[0], 0.0) + self._item_cost.get(kind, 1.0) * self._queued[key][1]
        self._place(key, worker)
        return Assignment(key, kind, worker)

    def _emptied_for(self, key: Hashable, able: Iterable[_Ability]) -> str | None:
        """The worker kept for ``key`` once it has nothing else to do; one is chosen where there is none."""
        worker = next((name for name, kept in self._kept_for.items() if kept == key), None)
        if worker is None and (worker := self._least_loaded(able, {})) is not None:
            self._keep(worker, key)
        return None if worker is None or self._held[worker] else worker

    def _let_go(self) -> None:
        """Keep no worker for a task that is not the next of its kind, may not start, or not there."""
        for worker, key in [entry for entry in self._kept_for.items() if entry[1] in self._queued]:
            kind, items = self._queued[key]
            ability, first = self._ability(worker), self._peek(self._ready[kind])
            able = ability.owns(kind) or kind in ability.helps
            if not (able and first == key and self._may_start(kind, items)):
                self._keep(worker, None)

    def _not_alone(self, key: Hashable) -> None:
        self._alone.discard(key)
        for worker in [name for name, kept in self._kept_for.items() if kept == key]:
            self._keep(worker, None)

    def _keep(self, worker: str, key: Hashable | None) -> None:
        self._unshelve(worker)
        self._kept_for.pop(worker, None)
        if key is not None:
            self._kept_for[worker] = key
        self._shelve(worker)

    def _catch_up(self, job: str) -> None:
        """A job that had nothing to do has saved up no claim on the time of the others."""
        if not self.has_work(job):
            busy = {kind[0] for kind, items in self._ready_items.items() if items or self._running_items[kind]}
            others = min((self._served.get(name, 0.0) for name in busy), default=0.0)
            self._served[job] = max(self._served.get(job, 0.0), others)

    def _may_start(self, kind: Kind, items: int) -> bool:
        # The first batch always may, or a batch larger than the limit would never run.
        return self.allowed_items(kind) >= items or self._stock[kind] + self._running_items[kind] == 0

    def _peek(self, heap: list[tuple[Any, Hashable]]) -> Hashable | None:
        while heap and heap[0][1] not in self._queued:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _least_loaded(self, able: Iterable[_Ability], holders: Mapping[str, int]) -> str | None:
        for level in range(self.depth):
            shelves = [shelf for ability in able if (shelf := self._free[ability][level])]
            if shelves:
                near = [name for name in holders if any(name in shelf for shelf in shelves)]
                return max(near, key=holders.__getitem__) if near else next(iter(shelves[0]))
        return None

    def _place(self, key: Hashable, worker: str) -> None:
        kind, items = self._queued.pop(key)
        self._ready_items[kind] -= items
        self._unshelve(worker)
        self._held[worker][key] = None
        self._shelve(worker)
        self._placed[key] = kind, items, worker
        self._running_items[kind] += items

    def _change_turns(self) -> bool:
        """Workers that have nothing left to do at their turn go on to where most work waits."""
        changed = False
        for worker in list(self._idle_turners):
            own = self._seats[worker].own or ()
            best = max(own, key=lambda kind: (self.startable_items(kind), own.index(kind)), default=None)
            if best is not None and best != self._turn[worker] and self.startable_items(best) > 0:
                self._unshelve(worker)
                self._turn[worker] = best
                self._shelve(worker)
                changed = True
        return changed

    def _feed(self) -> bool:
        """A turn ends early where a stage that nobody is at would give work to others that run out of it."""
        for kind in [kind for kind in self._next if self._unfed(kind)] if self._turners else ():
            for worker in [name for name in self._turners if kind in (self._seats[name].own or ())]:
                self._unshelve(worker)
                turn, feeds = self._turn[worker], self._unfed(kind)  # asked without it: nobody leaves to feed himself
                self._turn[worker] = kind if feeds else turn
                self._shelve(worker)
                if self._turn[worker] != turn:
                    return True
        return False

    def _unfed(self, kind: Kind) -> bool:
        """Work of ``kind`` waits and nobody is at it, none of the following stage does, and a worker has room."""
        return (
            (following := self._next.get(kind)) is not None
            and self.startable_items(kind) > 0
            and not self._ready_items[following]
            and not any(ability.owns(kind) for ability in self._free)
            and any(any(levels[: self.depth]) for levels in self._only(following, kind))
        )

    def _feeder(self, kind: Kind) -> Kind | None:
        """The stage before, if who runs both should make more of ``kind`` than take it from those that run it alone."""
        before = self._before.get(kind)
        if before is None or not self.startable_items(before):
            return None
        others = sum(len(shelf) for levels in self._only(kind, before) for shelf in levels)
        return before if len(self._ready[kind]) < self.depth * others else None

    def _only(self, kind: Kind, other: Kind) -> Iterator[list[dict[str, None]]]:
        return (levels for ability, levels in self._free.items() if ability.owns(kind) and not ability.owns(other))

    # -- workers by ability and load

    def _ability(self, worker: str) -> _Ability:
        seat = self._seats[worker]
        if worker in self._paused:
            return _Ability((), ())
        if seat.turns:
            turn = self._turn[worker]
            return _Ability((turn,) if turn else (), ())
        return _Ability(seat.own, seat.helps)

    def _level(self, worker: str) -> int:
        return self.depth if worker in self._kept_for else min(len(self._held[worker]), self.depth)

    def _shelve(self, worker: str) -> None:
        levels = self._free.setdefault(self._ability(worker), [{} for _ in range(self.depth + 1)])
        levels[self._level(worker)][worker] = None
        if self._seats[worker].turns and worker not in self._paused:
            self._turners[worker] = None
            if self._level(worker) == 0:
                self._idle_turners[worker] = None

    def _unshelve(self, worker: str) -> None:
        self._turners.pop(worker, None)
        self._idle_turners.pop(worker, None)
        ability = self._ability(worker)
        levels = self._free[ability]
        levels[self._level(worker)].pop(worker, None)
        if not any(levels):
            del self._free[ability]


@dataclass(frozen=True, slots=True)
class _Ability:
    own: tuple[Kind, ...] | None
    helps: tuple[Kind, ...]

    def owns(self, kind: Kind) -> bool:
        return self.own is None or kind in self.own

    def breadth(self) -> float:
        return math.inf if self.own is None else len(self.own)
