"""Roles from what is known: costs that finished tasks teach, the work that is left, and the fleet.

Pure: the gate tells it what happens and carries out its decisions, and so does the simulator.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from dfdask.capacity import fits, usable, ways
from dfdask.cost import CostModel, ItemWork, TaskWork
from dfdask.dispatch import Kind, Seat
from dfdask.placement import MARGIN, Device, Option, Placement, StageWork, place
from dfdask.stragglers import STEP, Stragglers

ANY_CLASS = "*"
TURN_LOADS = 100
"""A worker that takes turns works so many times as long as its loads take: they cost it one per cent."""
FREE_LOADS = 0.005
"""Loads that are a smaller part of a task's time are no reason to keep to a stage while others run out of work."""
KEPT_LOADS = 5
"""A stage's loads count by the median of so many: the first comes from disk, the others from host memory."""
DRIFT = 0.1
"""The logarithm by which a cost must change to be news: by chance, with tasks a fifth off, it changes less."""


@dataclass(frozen=True, slots=True)
class StageFacts:
    """A stage of a job: bytes that its components keep on a device, and seconds to bring them there, by class.

    Seconds for ``ANY_CLASS`` hold where a class has none of its own. ``streamed`` are the least bytes of each component
    where its blocks pass through the device; empty where they cannot.
    """

    name: str
    weights: Mapping[str, int] = field(default_factory=dict)
    working_bytes: int = 0
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    ahead_items: float = math.inf
    streamed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobFacts:
    """A job as the controller knows it; ``model`` is what its costs are shared by."""

    name: str
    model: str
    stages: tuple[StageFacts, ...]
    items: int
    batch: int = 1
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Roles that changed, and the numbers that made it. ``shares`` of all workers' time by kind, helpers with 0."""

    seats: dict[str, Seat]
    shares: dict[str, dict[Kind, float]]
    placement: Placement


@dataclass(frozen=True, slots=True)
class _DeviceKind:
    """Devices that are alike in what they may run and how fast."""

    device_class: str
    level: int = 0
    only: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        slow = f" x{math.exp(self.level * STEP):.2f}" if self.level else ""
        only = f" for {','.join(sorted(self.only))}" if self.only else ""
        return f"{self.device_class}{slow}{only}"


class Controller:
    """Keeps count of items and costs, and decides who runs what.

    ``ended_tasks`` since the last decision; ``has_drifted`` where costs are not any more what it was made with.
    """

    def __init__(self, costs: CostModel | None = None, margin: float = MARGIN) -> None:
        self.costs = costs or CostModel()
        self._margin = margin
        self._jobs: dict[str, JobFacts] = {}
        self._left: dict[Kind, int] = {}
        self._devices: dict[str, Device] = {}
        self._kinds: dict[str, _DeviceKind] = {}
        self._seats: dict[str, Seat] = {}
        self._stragglers = Stragglers()
        self._loads: dict[tuple[str, str, str], deque[float]] = {}
        self._working: dict[tuple[str, str, str], int] = {}
        self._item_work: dict[tuple[str, str], ItemWork] = {}
        self._ahead: dict[Kind, float] = {}
        self._paused: set[str] = set()
        self._decided_on: dict[tuple[str, str, str, int], float] = {}
        self.has_drifted = False
        self.ended_tasks = 0

    def add_job(self, job: JobFacts) -> None:
        self._jobs[job.name] = job
        for stage in job.stages:
            self._left[job.name, stage.name] = job.items

    def remove_job(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        for stage in job.stages if job else ():
            del self._left[name, stage.name]
            self._ahead.pop((name, stage.name), None)

    @property
    def jobs(self) -> Mapping[str, JobFacts]:
        return self._jobs

    @property
    def works_ahead(self) -> bool:
        """Whether workers must load something to follow the work: a large stock of results saves them changes."""
        alike = {  # few, however large the fleet
            (self._kinds[name], self._devices[name].memory_bytes, seat) for name, seat in self._seats.items()
        }
        return any(seat.turns or self._would_load(kind, memory, seat) for kind, memory, seat in alike)

    def add_device(self, device: Device, only: frozenset[str] = frozenset()) -> None:
        """A worker came; it may run ``only`` those stages where there are any."""
        self._devices[device.name] = device
        self._kinds[device.name] = _DeviceKind(device.device_class, 0, only)
        self._seats.setdefault(device.name, Seat(()))

    def pause(self, name: str, paused: bool = True) -> bool:
        """Count on a device or not; returns whether that is new."""
        if name not in self._devices or paused == (name in self._paused):
            return False
        (self._paused.add if paused else self._paused.discard)(name)
        return True

    def seat(self, name: str) -> Seat | None:
        """What a device that is counted on may run."""
        return None if name in self._paused else self._seats.get(name)

    def remove_device(self, name: str) -> None:
        self._paused.discard(name)
        self._devices.pop(name, None)
        self._kinds.pop(name, None)
        self._seats.pop(name, None)
        self._stragglers.forget(name)

    def holds(self, name: str, components: frozenset[str]) -> None:
        """What a worker has on its device now."""
        device = self._devices.get(name)
        if device is not None and device.holds != components:
            self._devices[name] = replace(device, holds=components)

    def finished(
        self,
        kind: Kind,
        items: int,
        device: str,
        seconds: float,
        load_seconds: float = 0.0,
        again: bool = False,
        whole: bool = True,
    ) -> float:
        """A task ended; ``seconds`` of its device, loads and transfers left out. Returns what was predicted, or NaN.

        ``again``: its items were counted before, and their results lost. Unless ``whole`` it did not do all of them
        and its seconds teach nothing.
        """
        if kind not in self._left:
            return math.nan
        if not again:
            self._left[kind] = max(self._left[kind] - items, 0)
        job, worker = self._jobs[kind[0]], self._kinds.get(device)
        if worker is None:
            return math.nan
        self.loaded(kind, device, load_seconds)
        if not whole:
            self.has_drifted = self.has_drifted or not self._left[kind]
            return math.nan
        factor = self._stragglers.factor(device)
        work = TaskWork(items)
        key = job.model, kind[1], worker.device_class
        believed, is_first = self._believed(*key, items), not self.costs.count(*key)
        self.costs.observe(*key, work, seconds / factor)
        if items:
            self._stragglers.observe(key, device, seconds / items)
        self._is_news(self._decided_on.setdefault((*key, items), believed), believed)
        is_first = is_first or self._left[kind] + items >= job.items  # what its results weigh was not known
        slowed = self._stragglers.factor(device) != factor
        self.has_drifted = self.has_drifted or is_first or not self._left[kind] or slowed
        self.ended_tasks += 1
        return believed * factor

    def wants_work(self, run: str) -> bool:
        """Whether ``count_work`` would tell anything new of a job's model."""
        job = self._jobs.get(run)
        return job is not None and any((job.model, stage.name) not in self._item_work for stage in job.stages)

    def count_work(self, run: str, works: Mapping[str, ItemWork]) -> bool:
        """What an item of each stage has to do, for device classes that have not run it; whether any has not."""
        job = self._jobs.get(run)
        if job is None:
            return False
        self._item_work.update({(job.model, stage): work for stage, work in works.items()})
        classes = {kind.device_class for kind in self._kinds.values()}
        return not all(self.costs.count(job.model, stage, each) for stage in works for each in classes)

    def loaded(self, kind: Kind, device: str, seconds: float) -> None:
        """Weights came to the device within ``seconds``; 0 where they were there."""
        if kind in self._left and device in self._kinds and seconds > 0:
            key = self._jobs[kind[0]].model, kind[1], self._kinds[device].device_class
            loads = self._loads.setdefault(key, deque(maxlen=KEPT_LOADS))
            known = median(loads) if loads else None
            loads.append(seconds)
            self._is_news(known, median(loads))

    def used_memory(self, kind: Kind, device: str, working_bytes: int) -> None:
        """What a task took of its device's memory beside the weights."""
        if kind in self._left and device in self._kinds and working_bytes > 0:
            key = self._jobs[kind[0]].model, kind[1], self._kinds[device].device_class
            self._is_news(self._working.get(key), working_bytes)
            self._working[key] = working_bytes

    def _is_news(self, known: float | None, now: float) -> None:
        """That a cost was not ``known``, or has moved further than chance moves it."""
        self.has_drifted = self.has_drifted or not known or abs(math.log(now / known)) > DRIFT

    def turn_items(self, run: str) -> float:
        """How many results in stock are worth it to workers that load stages in turn: more would only make results
        late, and a loss of a worker dear.
        """
        job = self._jobs[run]
        most = 0.0
        for kind, number in Counter(self._kinds.values()).items():
            loads = sum(self._load_seconds(job, stage, kind) for stage in job.stages)
            each = sum(self.seconds_per_item((run, stage.name), kind.device_class) for stage in job.stages)
            most += number * TURN_LOADS * loads / each
        return most

    def left(self, kind: Kind) -> int:
        """Items that have not finished the stage."""
        return self._left.get(kind, 0)

    def at_least_left(self, kind: Kind, items: int) -> None:
        """So many are ready or running, whatever was counted: results that were lost are made again."""
        if kind in self._left:
            self._left[kind] = max(self._left[kind], items)

    def set_ahead(self, kind: Kind, items: float) -> None:
        """How many results of a stage may wait for the next one, now that their size is known."""
        self._ahead[kind] = items

    def decide(self) -> Decision:
        """Roles for now. Only those that change are among the decision's seats."""
        self._decided_on.clear()
        self.has_drifted, self.ended_tasks = False, 0
        self._judge_speeds()
        placement = place(self.work(), self._devices_by_kind(), self._margin)
        changed, shares = {}, {}
        alike: dict[tuple[int, int], tuple[Seat, dict[Kind, float], tuple[Kind, ...]]] = {}
        for name, roles in placement.roles.items():
            key = id(roles), self._devices[name].memory_bytes  # large fleets have few groups with roles of their own
            if key not in alike:
                parts = {(role.job, role.stage): role.share for role in roles}
                alike[key] = self._seat(name, placement), parts, tuple(kind for kind in parts if parts[kind] > 0)
            seat, shares[name], own = alike[key]
            if seat != self._seats[name]:
                changed[name] = self._seats[name] = seat
            if set(own) != set(self._devices[name].runs):
                self._devices[name] = replace(self._devices[name], runs=own)
        return Decision(changed, shares, placement)

    def work(self) -> list[StageWork]:
        """What is left, with the present beliefs of what it costs."""
        kinds = set(self._kinds.values())
        return [
            StageWork(
                job.name,
                stage.name,
                self._left[job.name, stage.name],
                {kind.name: self._options(job, stage, kind) for kind in kinds},
                job.weight,
                self._ahead.get((job.name, stage.name), stage.ahead_items),
            )
            for job in self._jobs.values()
            for stage in job.stages
        ]

    def seconds_per_item(self, kind: Kind, device_class: str) -> float:
        """As believed now, in batches of the job's size."""
        job = self._jobs[kind[0]]
        return self._believed(job.model, kind[1], device_class, job.batch) / job.batch

    def weight_bytes(self, kind: Kind) -> tuple[int, int]:
        """What a stage's weights take of a device, and what is the least of it where they are streamed."""
        stage = next(stage for stage in self._jobs[kind[0]].stages if stage.name == kind[1])
        whole = sum(stage.weights.values())
        return whole, sum(stage.streamed.values()) if stage.streamed else whole

    def knows(self, kind: Kind, device_class: str) -> bool:
        """Whether what a stage takes there is more than a guess: measured, or counted for a device of known rates."""
        model = self._jobs[kind[0]].model
        counted = (model, kind[1]) in self._item_work and self.costs.rates_of(device_class) is not None
        return counted or self.costs.count(model, kind[1], device_class) > 0

    def item_costs(self) -> dict[Kind, float]:
        """Seconds of an item on the commonest devices over its job's weight: what it takes of the job's fair share.

        A stage of unknown cost counts like the mean of the others: a guess that is far off would leave its job without
        its share until the next decision.
        """
        classes = Counter(device.device_class for device in self._devices.values()).most_common(1)
        common = classes[0][0] if classes else ""
        seconds = {kind: self.seconds_per_item(kind, common) for kind in self._left}
        models = {kind: self._jobs[kind[0]].model for kind in seconds}
        known = [
            kind
            for kind, model in models.items()
            if (model, kind[1]) in self._item_work or self.costs.count(model, kind[1], common)
        ]
        if known:
            usual = sum(seconds[kind] for kind in known) / len(known)
            seconds.update(dict.fromkeys(seconds.keys() - set(known), usual))
        return {kind: each / self._jobs[kind[0]].weight for kind, each in seconds.items()}

    def _believed(self, model: str, stage: str, device_class: str, items: int) -> float:
        """Seconds of a task: by what tasks took, or else by what is to be done."""
        counted = self._item_work.get((model, stage))
        if counted is None or self.costs.count(model, stage, device_class):
            return self.costs.seconds(model, stage, device_class, TaskWork(items))
        return self.costs.first_seconds(model, stage, device_class, counted.work(items))

    def _would_load(self, kind: _DeviceKind, memory_bytes: int, seat: Seat) -> bool:
        """Whether a worker with this seat may run stages that it cannot keep beside its own."""
        here = {*(seat.own or ()), *seat.helps}
        waiting = [(job, one) for job in self._jobs.values() for one in job.stages if self._left[job.name, one.name]]
        if kind.only or not any(
            (job.name, stage.name) not in here and self._load_seconds(job, stage, kind) > 0 for job, stage in waiting
        ):
            return False
        able = [usable(self._options(*work, kind), memory_bytes) for work in waiting]
        return not fits([options[0] for options in able if options], memory_bytes)

    def _load_seconds(self, job: JobFacts, stage: StageFacts, kind: _DeviceKind) -> float:
        usual = stage.load_seconds.get(kind.device_class, stage.load_seconds.get(ANY_CLASS, 0.0))
        loads = self._loads.get((job.model, stage.name, kind.device_class))
        return median(loads) if loads else usual

    def _judge_speeds(self) -> None:
        for name, kind in self._kinds.items():
            level = self._stragglers.level(name)
            if kind.level != level:
                self._kinds[name] = replace(kind, level=level)

    def _devices_by_kind(self) -> list[Device]:
        return [
            replace(device, device_class=self._kinds[name].name)
            for name, device in self._devices.items()
            if name not in self._paused
        ]

    def _options(self, job: JobFacts, stage: StageFacts, kind: _DeviceKind) -> Sequence[Option]:
        if kind.only and stage.name not in kind.only:
            return ()
        seconds = self.seconds_per_item((job.name, stage.name), kind.device_class) * math.exp(kind.level * STEP)
        load = self._load_seconds(job, stage, kind)
        whole = Option(seconds, job.batch, stage.weights, stage.working_bytes, load)
        counted = self._item_work.get((job.model, stage.name))
        seen = self.costs.count(job.model, stage.name, kind.device_class)
        passing = counted.call_bytes if counted is not None and not seen else 0.0
        return ways(whole, stage.streamed, kind.device_class, passing)

    def _seat(self, name: str, placement: Placement) -> Seat:
        roles = placement.roles[name]
        own = tuple(sorted(((role.job, role.stage) for role in roles if role.share > 0), key=self._order))
        helps = tuple(sorted((role.job, role.stage) for role in roles if role.share <= 0))
        options = [role.option for role in roles if role.share > 0]
        device_class = self._kinds[name].device_class
        seen = [self._working.get((self._jobs[job].model, stage, device_class), 0) for job, stage in own]
        needs = [replace(option, working_bytes=max(option.working_bytes, *seen)) for option in options]
        crowded = not fits(needs, self._devices[name].memory_bytes)
        loads = sum(option.load_seconds for option in options)
        tasks = sum(option.seconds_per_item * option.batch for option in options)
        return Seat(own, helps, turns=crowded and loads > FREE_LOADS * tasks)

    def _order(self, kind: Kind) -> tuple[str, int]:
        names = [stage.name for stage in self._jobs[kind[0]].stages]
        return kind[0], names.index(kind[1])
