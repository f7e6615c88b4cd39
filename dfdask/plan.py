"""A forecast of a job on a described fleet, before the first second of a device is spent.

Operations are counted without weights, seconds predicted by the cost model, roles chosen by the same placement as
in a run. What is not known is said, never guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from distributed.system import MEMORY_LIMIT

from dfdask.capacity import ways
from dfdask.cost import CostModel, Prediction, TaskWork
from dfdask.errors import ModelError, SpecError
from dfdask.items import Item
from dfdask.machine import gpus, local_workers
from dfdask.placement import Device, Option, Role, StageWork, place
from dfdask.prepare import batch_size
from dfdask.prompts import read_items
from dfdask.spec import JobSpec
from dfdask.stages.model import model_ref, with_defaults
from dfdask.stages.weights import component_bytes, cost_key
from dfdask.tags import UNKNOWN_CLASS
from dfdask.words import brief, count, duration, size

LOAD_BYTES_PER_SECOND = 4.75e9
"""Weights from warm files to a device: 9.5 GB took 2 s on the machine of ``device_rates.json``."""
_FLEET = re.compile(r"(?:(\d+)x)?([A-Za-z][\w-]*)(?::(\d+(?:\.\d+)?)\s*GB)?")


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage: its weights, and by device class seconds of a batch, None where nothing is known."""

    name: str
    weights_bytes: int
    seconds: dict[str, Prediction | None]


@dataclass(frozen=True, slots=True)
class Forecast:
    """``seconds`` is None where a class of devices was never measured; ``deviation_seconds`` is what is in doubt.

    ``roles`` counts workers by device class and what they run.
    """

    items: int
    batch: int
    stages: tuple[StageForecast, ...]
    workers: tuple[Device, ...]
    measured: bool
    roles: tuple[tuple[str, int], ...]
    policy: str
    seconds: float | None
    deviation_seconds: float
    bound_seconds: float | None
    impossible: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values for people."""
        kinds = Counter((device.device_class, device.memory_bytes) for device in self.workers)
        found = [
            ("items", f"{self.items:,} in batches of {self.batch}"),
            (
                "workers",
                ", ".join(f"{number} x {kind} with {size(memory)}" for (kind, memory), number in kinds.items()),
            ),
        ]
        for stage in self.stages:
            known = [
                f"{brief(one.seconds / self.batch)} an item on {kind}" if one else f"not known on {kind}"
                for kind, one in stage.seconds.items()
            ]
            found.append((stage.name, f"{', '.join(known)}; {size(stage.weights_bytes)} of weights"))
        for text, number in self.roles:
            found.append(("roles", f"{count(number, 'worker')}: {text}"))
        if self.impossible:
            found.append(("impossible", f"no worker has the memory for {', '.join(self.impossible)}"))
        elif self.seconds is None:
            found.append(("time", "not known: nothing was measured on these devices; run it with --limit first"))
        else:
            doubt = f" give or take {duration(self.deviation_seconds)}" if self.deviation_seconds else ""
            found += [
                ("time", f"{duration(self.seconds)}{doubt}, loading included, starting and writing not"),
                ("why", f"{_WHY[self.policy]}; no roles could do it faster than {duration(self.bound_seconds or 0.0)}"),
            ]
            if not self.measured:
                found.append(("note", "no measurement of this model yet: predicted from operations and other models"))
        return found


_WHY = {
    "as it is": "nothing to change",
    "none": "nothing to do",
    "shared": "time shared between stages by what is left of each",
    "whole workers": "one stage each, so that nothing is loaded twice",
    "whole models": "the whole model fits on every worker: replicas",
}


def forecast(spec: JobSpec, workers: str | None = None, costs: CostModel | None = None) -> Forecast:
    """What ``spec`` takes on ``workers``, such as ``8xh100:80GB,4xl4:24GB``, or on this machine's.

    ``costs`` are what runs have taught. Raises SpecError, PromptError and ModelError.
    """
    spec, costs = with_defaults(spec), costs or CostModel()
    table = read_items(spec)
    ref = model_ref(spec)
    key = cost_key(spec, ref)
    devices = parse_fleet(workers) if workers else _local(spec)
    total = len(table)
    batch = min(batch_size(spec, total, len(devices)), max(total, 1))
    sample = table.items(0, batch)
    works = _fake(spec, batch) if ref.fake else _counted(spec, sample)
    classes = sorted({device.device_class for device in devices})
    measured = ref.fake is not None
    stages, load = [], []
    for name, work in works.items():
        seconds: dict[str, Prediction | None] = {}
        loading = sum(work.weights.values()) / LOAD_BYTES_PER_SECOND
        options = {}
        for kind in classes:
            seen = costs.count(key, name, kind) > 0
            if ref.fake:
                one: Prediction | None = Prediction(spec_seconds(spec, name) * batch, 0.0)
            elif seen or costs.rates_of(kind):
                measured = measured or seen
                # What runs teach is by items alone.
                one = costs.predict(key, name, kind, TaskWork(batch) if seen else work.task)
            else:
                one = None
            seconds[kind] = one
            whole = Option(max(one.seconds / batch, 1e-9) if one else 1.0, batch, work.weights, 0, loading)
            options[kind] = ways(whole, work.streamed, kind, 0.0 if seen else work.passing_bytes)
        stages.append(StageForecast(name, sum(work.weights.values()), seconds))
        load.append(StageWork("job", name, total, options))
    placement = place(load, devices)
    known = all(one is not None for stage in stages for one in stage.seconds.values())
    impossible = tuple(stage for _, stage in placement.impossible)
    roles = Counter(
        f"{'+'.join(_named(role) for role in held if role.share > 0) or 'idle'} on {device.device_class}"
        for device in devices
        for held in [placement.roles[device.name]]
    )
    expected = placement.seconds.get("job", 0.0) if known and not impossible else None
    doubt = _doubt(stages)
    return Forecast(
        total,
        batch,
        tuple(stages),
        tuple(devices),
        measured,
        tuple(sorted(roles.items())) if known else (),
        placement.policy,
        expected,
        (expected or 0.0) * doubt,
        placement.bound_seconds.get("job") if known else None,
        impossible,
    )


def parse_fleet(text: str) -> list[Device]:
    """``COUNTxCLASS:MEMORYGB`` and more, with commas between. Raises SpecError."""
    devices: list[Device] = []
    for part in text.split(","):
        found = _FLEET.fullmatch(part.strip())
        if found is None or found[1] == "0" or (found[1] and int(found[1]) > 100_000):
            raise SpecError(
                f"--workers: {part.strip()!r} is not COUNTxCLASS:MEMORYGB; write e.g. 8xh100:80GB,4xl4:24GB"
            )
        number, kind, memory = int(found[1] or 1), found[2], found[3]
        if memory is None:
            raise SpecError(f"--workers: {part.strip()!r} lacks its memory; write e.g. {part.strip()}:80GB")
        devices += [Device(f"{kind} {len(devices) + place}", kind, int(float(memory) * 1e9)) for place in range(number)]
    return devices


def spec_seconds(spec: JobSpec, stage: str) -> float:
    """Seconds an item of a fake stage."""
    return 0.0 if isinstance(spec.model, str) else spec.model.fake.stages[stage]


def _local(spec: JobSpec) -> list[Device]:
    """The workers that a run would start here; those that say nothing of their memory share the host's."""
    workers = local_workers(spec.workers, gpus(spec.device))
    memory = MEMORY_LIMIT // max(len(workers), 1)
    return [
        Device(f"local {number}", one.device_class or UNKNOWN_CLASS, one.memory_bytes or memory)
        for number, one in enumerate(workers)
    ]


def _named(role: Role) -> str:
    return f"{role.stage} (streamed)" if role.option.streamed else role.stage


@dataclass(frozen=True, slots=True)
class _Work:
    """Of a stage: what a task has to do, the bytes of its components, and what streaming them keeps and moves."""

    task: TaskWork
    weights: dict[str, int] = field(default_factory=dict)
    streamed: dict[str, int] = field(default_factory=dict)
    passing_bytes: float = 0.0


def _fake(spec: JobSpec, batch: int) -> dict[str, _Work]:
    names = () if isinstance(spec.model, str) else spec.model.fake.stages
    return {name: _Work(TaskWork(batch)) for name in names}


def _counted(spec: JobSpec, sample: list[Item]) -> dict[str, _Work]:
    from dfdask.stages.cut import stage_names
    from dfdask.stages.model import WHOLE, locate
    from dfdask.stages.profile import stage_profiles

    ref = model_ref(spec)
    if stage_names(locate(ref.source, ref.revision)) == (WHOLE,):
        raise ModelError(f"model: {ref.source} has no stages to plan with; run a few items and look at their times")
    profiles = stage_profiles(ref, sample[0])
    for name, profile in profiles.items():
        if profile.problem:
            raise ModelError(
                f"model: the operations of {name} cannot be counted ({profile.problem}); "
                "run a few items and plan from what they took"
            )
    whole, kept = (_by_name(sizes.get(WHOLE, {})) for sizes in component_bytes(ref))
    return {
        name: _Work(
            profile.item_work.work(len(sample)),
            {part: whole.get(part, size) for part, size in profile.weight_bytes.items()},
            {part: kept[part] for part in profile.weight_bytes if part in kept},
            profile.item_work.call_bytes,
        )
        for name, profile in profiles.items()
    }


def _by_name(sizes: Mapping[str, int]) -> dict[str, int]:
    return {name.rpartition("/")[2]: size for name, size in sizes.items()}


def _doubt(stages: list[StageForecast]) -> float:
    """The relative deviation of the whole: that of its stages by what they take, on the class that knows least."""
    parts = []
    for kind in stages[0].seconds if stages else ():
        known = [one for stage in stages if (one := stage.seconds[kind]) is not None]
        seconds = sum(one.seconds for one in known)
        parts.append(math.hypot(*(one.deviation_seconds for one in known)) / seconds if seconds else 0.0)
    return max(parts, default=0.0)
