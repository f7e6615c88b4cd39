"""Roles from what is known: costs that finished tasks teach, the work that is left, and the fleet.

Pure: the gate tells it what happens and carries out its decisions, and so does the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dfdask.cost import CostModel, TaskWork
from dfdask.dispatch import Kind, Seat
from dfdask.placement import MARGIN, Device, Option, Placement, StageWork, place


@dataclass(frozen=True, slots=True)
class StageFacts:
    """A stage of a job: bytes that its components keep on a device, and seconds to bring them there, by class."""

    name: str
    weights: Mapping[str, int] = field(default_factory=dict)
    working_bytes: int = 0
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    ahead_items: float = math.inf


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
    """Roles that changed, and the numbers that made it."""

    seats: dict[str, Seat]
    placement: Placement


class Controller:
    """Keeps count of items and costs, and decides who runs what."""

    def __init__(self, costs: CostModel | None = None, margin: float = MARGIN) -> None:
        self.costs = costs or CostModel()
        self._margin = margin
        self._jobs: dict[str, JobFacts] = {}
        self._left: dict[Kind, int] = {}
        self._devices: dict[str, Device] = {}
        self._seats: dict[str, Seat] = {}

    def add_job(self, job: JobFacts) -> None:
        self._jobs[job.name] = job
        for stage in job.stages:
            self._left[job.name, stage.name] = job.items

    def remove_job(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        for stage in job.stages if job else ():
            del self._left[name, stage.name]

    def add_device(self, device: Device) -> None:
        """A worker came, or its device holds something else now."""
        old = self._devices.get(device.name)
        self._devices[device.name] = device
        if old is None:
            self._seats[device.name] = Seat()

    def remove_device(self, name: str) -> None:
        self._devices.pop(name, None)
        self._seats.pop(name, None)

    def holds(self, name: str, components: frozenset[str]) -> None:
        """What a worker has on its device now."""
        device = self._devices[name]
        if device.holds != components:
            self._devices[name] = Device(name, device.device_class, device.memory_bytes, components, device.runs)

    def finished(self, kind: Kind, items: int, device: str, seconds: float) -> None:
        """A task ended well; ``seconds`` of its device, loads and transfers left out."""
        if kind in self._left:
            self._left[kind] = max(self._left[kind] - items, 0)
            job, worker = self._jobs[kind[0]], self._devices.get(device)
            if worker is not None:
                self.costs.observe(job.model, kind[1], worker.device_class, TaskWork(items), seconds)

    def left(self, kind: Kind) -> int:
        """Items that have not finished the stage."""
        return self._left.get(kind, 0)

    def decide(self) -> Decision:
        """Roles for now. Only those that change are in the decision."""
        placement = place(self.work(), list(self._devices.values()), self._margin)
        changed = {}
        for name, roles in placement.roles.items():
            seat = self._seat(name, placement)
            own = tuple((role.job, role.stage) for role in roles if role.share > 0)
            if seat != self._seats[name]:
                changed[name] = self._seats[name] = seat
            device = self._devices[name]
            if set(own) != set(device.runs):
                self._devices[name] = Device(name, device.device_class, device.memory_bytes, device.holds, own)
        return Decision(changed, placement)

    def work(self) -> list[StageWork]:
        """What is left, with the present beliefs of what it costs."""
        classes = {device.device_class for device in self._devices.values()}
        return [
            StageWork(
                job.name,
                stage.name,
                self._left[job.name, stage.name],
                {kind: self._options(job, stage, kind) for kind in classes},
                job.weight,
                stage.ahead_items,
            )
            for job in self._jobs.values()
            for stage in job.stages
        ]

    def _options(self, job: JobFacts, stage: StageFacts, device_class: str) -> Sequence[Option]:
        predicted = self.costs.predict(job.model, stage.name, device_class, TaskWork(job.batch))
        load = stage.load_seconds.get(device_class, 0.0)
        return [Option(predicted.seconds / job.batch, job.batch, stage.weights, stage.working_bytes, load)]

    def _seat(self, name: str, placement: Placement) -> Seat:
        roles = placement.roles[name]
        own = tuple(sorted(((role.job, role.stage) for role in roles if role.share > 0), key=self._order))
        helps = tuple(sorted((role.job, role.stage) for role in roles if role.share <= 0))
        weights: dict[str, int] = {}
        for role in roles:
            if role.share > 0:
                weights.update(role.option.weights)
        working = max((role.option.working_bytes for role in roles if role.share > 0), default=0)
        turns = sum(weights.values()) + working > self._devices[name].memory_bytes
        return Seat(own, helps, turns)

    def _order(self, kind: Kind) -> tuple[str, int]:
        names = [stage.name for stage in self._jobs[kind[0]].stages]
        return kind[0], names.index(kind[1])
