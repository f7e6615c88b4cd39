"""What a worker says of itself, as Dask resources: visible in the dashboard and in ``client.scheduler_info()``.

``GPU``: how many, a part of one where workers share it; ``class:<name>``: the class of its device; ``memory``: the
bytes that components and a batch may take there; ``role:<stage>``: a stage that it runs. Roles that a worker brings
along bind it to them; on one without any the gate sets them, with the share of its time as the amount. ``compute``: its
device, which one stage task has at a time; what is written needs it not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GPU = "GPU"
CLASS = "class:"
MEMORY = "memory"
ROLE = "role:"
STAGE = "stage:"
COMPUTE = "compute"
UNKNOWN_CLASS = "cpu"


@dataclass(frozen=True, slots=True)
class Tags:
    """``memory_bytes`` is None where the worker has no limit; ``only`` are the stages that it is bound to, if any."""

    device_class: str = UNKNOWN_CLASS
    memory_bytes: int | None = None
    only: frozenset[str] = frozenset()


def worker_resources(
    stages: Iterable[str] = (), device_class: str | None = None, memory_bytes: int | None = None, gpus: float = 0
) -> dict[str, float]:
    """The resources that a worker is started with."""
    found: dict[str, float] = {ROLE + stage: 1 for stage in stages}
    if device_class is not None:
        found[CLASS + device_class] = 1
    if memory_bytes is not None:
        found[MEMORY] = memory_bytes
    if gpus:
        found[GPU] = gpus
    return found


def class_of_gpu(name: str) -> str:
    """The class of a GPU by the name that its driver has for it: ``h100-80gb-hbm3`` of ``NVIDIA H100 80GB HBM3``."""
    return "-".join(name.lower().removeprefix("nvidia ").split())


def read_tags(resources: Mapping[str, float]) -> Tags:
    """What the resources of a worker that has just joined mean."""
    present = [name for name, amount in resources.items() if amount]
    classes = sorted(name.removeprefix(CLASS) for name in present if name.startswith(CLASS))
    memory = resources.get(MEMORY)
    return Tags(
        classes[0] if classes else UNKNOWN_CLASS,
        None if memory is None else int(memory),
        frozenset(name.removeprefix(ROLE) for name in present if name.startswith(ROLE)),
    )


def stage_resource(stage: str) -> dict[str, float]:
    """The resource that tasks of ``stage`` ask for and only the gate can satisfy."""
    return {STAGE + stage: 1}


def compute_resource(offered: Mapping[str, float]) -> dict[str, float]:
    """What a stage task takes of its worker. A write takes nothing: it must not wait until a long stage task ends."""
    return {COMPUTE: 1} if COMPUTE in offered else {}


def task_key(stage: str, run: str, shard: int, index: int, items: int) -> tuple[str, int, int, int]:
    """Dask's dashboard groups tasks by the first part; the gate counts items by the last."""
    return (f"{stage}-{run}", shard, index, items)
