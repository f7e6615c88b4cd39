"""What this machine computes on, and the worker processes to start here: one on each GPU, else one on each core."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed.system import MEMORY_LIMIT

from dfdask.errors import ClusterError
from dfdask.spec import WorkerGroup
from dfdask.stages.budget import HOST_MEMORY_BYTES, HOST_PART, MEMORY_BYTES, bytes_of, usable_bytes
from dfdask.tags import UNKNOWN_CLASS, class_of_gpu, worker_resources

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
CONTEXT_BYTES = 1 << 29
"""What CUDA takes of a GPU in each process, about, before that asks for any."""
DEVICE_FILES = Path("/dev")
_DRIVER_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """``name`` is what CUDA_VISIBLE_DEVICES calls it.

    Its class and memory are known where the driver's tool tells them, which it does not for slices (MIG).
    """

    name: str
    device_class: str = "gpu"
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """A worker process to start here, on a ``gpu`` that ``sharers`` of them use, or on the CPU where that is None.

    ``host_bytes`` are its part of this machine's memory, for weights that are not on the GPU; ``limit_bytes`` are what
    the operator allows on the device.
    """

    stages: tuple[str, ...] = ()
    device_class: str | None = None
    memory_bytes: int | None = None
    gpu: str | None = None
    sharers: int = 1
    host_bytes: int = 0
    limit_bytes: int | None = None

    @property
    def resources(self) -> dict[str, float]:
        gpus = 0.0 if self.gpu is None else 1 / self.sharers
        return worker_resources(self.stages, self.device_class, self.memory_bytes, gpus)

    @property
    def environment(self) -> dict[str, str]:
        found = {}
        if self.limit_bytes is not None:
            found[MEMORY_BYTES] = str(self.limit_bytes)
        if self.gpu is not None:
            found |= {VISIBLE: self.gpu, HOST_MEMORY_BYTES: str(self.host_bytes)}
        elif self.device_class == UNKNOWN_CLASS:
            found["DFDASK_DEVICE"] = "cpu"
        return found


def local_workers(groups: int | Sequence[WorkerGroup] | None, found: Sequence[Gpu]) -> list[LocalWorker]:
    """The workers of ``groups``, or so many, or as many as there are GPUs, else CPU cores.

    They take the GPUs ``found`` in turn, but those of device class ``cpu``, and share the memory of one that several
    use. What a group says of its class and memory goes before what is found out. Raises ClusterError.
    """
    if groups is None:
        groups = len(found) or available_cores()
    if isinstance(groups, int):
        groups = [WorkerGroup(count=groups)]
    alone = [group for group in groups for _ in range(group.count)]
    on_gpus = [place for place, group in enumerate(alone) if found and group.device_class != UNKNOWN_CLASS]
    taken = {place: found[turn % len(found)] for turn, place in enumerate(on_gpus)}
    sharers = Counter(gpu.name for gpu in taken.values())
    limit, host = bytes_of(MEMORY_BYTES), host_share(len(on_gpus))
    workers = []
    for place, group in enumerate(alone):
        stages, gpu, given = tuple(group.stages or ()), taken.get(place), group.memory or limit
        if gpu is None:
            workers.append(LocalWorker(stages, group.device_class, given, limit_bytes=given))
            continue
        among, kind, memory = sharers[gpu.name], group.device_class or gpu.device_class, given
        if memory is None and gpu.memory_bytes:
            memory = usable_bytes(gpu.memory_bytes // among - CONTEXT_BYTES)
        workers.append(LocalWorker(stages, kind, memory, gpu.name, among, host, given))
    return workers


def host_share(workers: int) -> int:
    """What each of so many workers may take of this machine's memory. Raises ClusterError."""
    return bytes_of(HOST_MEMORY_BYTES) or int(MEMORY_LIMIT * HOST_PART) // max(workers, 1)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(device: str = "auto") -> list[Gpu]:
    """The GPUs that this process may use; none where ``device`` is the CPU or the installed torch knows no CUDA."""
    visible = os.environ.get(VISIBLE)
    if device == "cpu" or visible == "" or not _torch_has_cuda():
        return []
    there = _told() if shutil.which("nvidia-smi") else _seen()
    if visible is None:
        return list(there.values())
    # CUDA counts the fastest first unless it is told to count as the driver's tool does.
    alike = len({gpu.device_class for gpu in there.values()}) == 1 or os.environ.get(ORDER) == "PCI_BUS_ID"
    chosen = []
    for entry in map(str.strip, visible.split(",")):
        named = [gpu for index, gpu in there.items() if entry and (entry == index or gpu.name.startswith(entry))]
        if not named and not entry.startswith("MIG-"):
            break  # CUDA too takes those before the first that there is not
        chosen.append(named[0] if named and (alike or not entry.isdecimal()) else Gpu(entry))
    return chosen


def check_device(device: str) -> None:
    """Raises ClusterError where a worker on ``device`` could compute nothing."""
    if device == "cuda" and not _torch_has_cuda("hip"):
        raise ClusterError(
            "--device cuda: the torch that is installed here computes on no GPU; install one that does, or use "
            "--device auto"
        )


def _told() -> dict[str, Gpu]:
    """By index, as the driver's own tool tells: asking CUDA would take memory on each."""
    fields = "--query-gpu=index,uuid,name,memory.total"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
        return {
            index: Gpu(uuid, class_of_gpu(name), int(mebibytes) << 20 if mebibytes.isdecimal() else None)
            for index, uuid, name, mebibytes in rows
        }
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def _seen() -> dict[str, Gpu]:
    """By index, where there is no such tool, as in many containers."""
    count = sum(map(_may_use, DEVICE_FILES.glob("nvidia[0-9]*")))
    return {str(index): Gpu(str(index)) for index in range(count)}


def _may_use(path: Path) -> bool:
    """A batch system may show a device and let nobody open it."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def _torch_has_cuda(*others: str) -> bool:
    """Whether it is built for CUDA, or one of these. Read from its files: importing it takes seconds."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    told = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    return any(told.get(name) is not None for name in ("cuda", *others))
