"""What this machine has for workers, and who gets what of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from distributed import Client
from distributed.system import MEMORY_LIMIT
from fleet import until
from hypothesis import given
from hypothesis import strategies as st

from dfdask import machine
from dfdask.backends import SpecBackend
from dfdask.cluster import LocalFleet
from dfdask.cost import CostModel
from dfdask.errors import ClusterError
from dfdask.machine import CONTEXT_BYTES, Gpu, LocalWorker, available_cores, check_device, gpus, local_workers
from dfdask.plan import forecast
from dfdask.spec import JobSpec, WorkerGroup
from dfdask.stages.budget import HOST_PART, RESERVE_BYTES

TAKEN_BYTES = CONTEXT_BYTES + RESERVE_BYTES
FIRST = Gpu("GPU-3f-11", "h100-80gb-hbm3", 81_000 << 20)
SECOND = Gpu("GPU-4a-22", "l4", 23_000 << 20)
THIRD = Gpu("GPU-4a-33", "l4", None)
TABLE = """0, GPU-3f-11, NVIDIA H100 80GB HBM3, 81000
1, GPU-4a-22, NVIDIA L4, 23000
2, GPU-4a-33, NVIDIA L4, [N/A]
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's tool that prints this file, beside a torch that computes on GPUs."""
    table, tool = tmp_path / "table", tmp_path / "nvidia-smi"
    table.write_text(TABLE)
    tool.write_text(f'#!/bin/sh\ncase "$*" in *=index,uuid,name,memory.total*) cat {table};; *) exit 2;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DFDASK_MEMORY_BYTES", raising=False)
    monkeypatch.delenv("DFDASK_HOST_MEMORY_BYTES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(machine, "DEVICE_FILES", tmp_path)
    return table


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [FIRST, SECOND, THIRD]),
        ("2, 0", [THIRD, FIRST]),
        ("GPU-4a-2", [SECOND]),
        ("1,7,0", [SECOND]),
        ("1,,0", [SECOND]),
        ("-1", []),
        ("", []),
        ("MIG-9", [Gpu("MIG-9", "gpu", None)]),
    ],
)
@pytest.mark.usefixtures("driver")
def test_gpus_that_are_there(visible: str | None, expected: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == gpus("cuda") == expected and gpus("cpu") == []


def test_numbers_that_cuda_may_count_otherwise_are_left_to_it(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-4a-2")
    assert gpus() == [Gpu("0"), SECOND], "the fastest, which may be another than the first"
    driver.write_text("".join(line for line in TABLE.splitlines(keepends=True) if "L4" in line))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus() == [SECOND], "they are alike"


def test_classes_are_those_of_the_rates(driver: Path) -> None:
    assert all(CostModel().rates_of(gpu.device_class) for gpu in gpus())
    driver.write_text("0, GPU-1, a name, with a comma, 3\n")
    assert gpus() == [], "a tool of another kind"


def test_gpus_without_the_drivers_tool(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (driver.parent / "nvidia-smi").unlink()
    assert gpus() == []
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (driver.parent / name).touch()
    (driver.parent / "nvidia2").mkdir()  # that nobody may open
    assert gpus() == [Gpu("0"), Gpu("1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpus() == [Gpu("1")]


@pytest.mark.parametrize(("cuda", "expected"), [("None", "False"), ("'13.0'", "True")])
def test_whether_torch_computes_on_gpus(cuda: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('this takes seconds')")
    (tmp_path / "torch" / "version.py").write_text(f"cuda = {cuda}\n")
    code = "from dfdask.machine import _torch_has_cuda as has; print(has())"
    there = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    told = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == expected


def test_no_worker_starts_on_a_device_that_its_torch_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("auto", "cpu"):
        check_device(device)
    with pytest.raises(ClusterError, match="--device cuda: the torch that is installed here computes on no GPU"):
        check_device("cuda")
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda *others: others == ("hip",))
    check_device("cuda")


def test_a_worker_for_each_gpu_else_for_each_core() -> None:
    host = int(MEMORY_LIMIT * HOST_PART) // 3
    assert local_workers(None, [FIRST, SECOND, THIRD]) == [
        LocalWorker((), "h100-80gb-hbm3", (81_000 << 20) - TAKEN_BYTES, FIRST.name, 1, host),
        LocalWorker((), "l4", (23_000 << 20) - TAKEN_BYTES, SECOND.name, 1, host),
        LocalWorker((), "l4", None, THIRD.name, 1, host),
    ]
    assert local_workers(None, []) == [LocalWorker()] * available_cores()
    assert local_workers([], [FIRST]) == []
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_workers_on_one_gpu_share_its_memory() -> None:
    one, other, alone = local_workers(3, [FIRST, SECOND])
    assert one == alone and one.sharers == 2 and other.sharers == 1
    assert one.resources == {"GPU": 0.5, "class:h100-80gb-hbm3": 1, "memory": (40_500 << 20) - TAKEN_BYTES}
    part = int(MEMORY_LIMIT * HOST_PART) // 3
    assert one.environment == {"CUDA_VISIBLE_DEVICES": FIRST.name, "DFDASK_HOST_MEMORY_BYTES": str(part)}


def test_what_the_operator_says_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [WorkerGroup(stages=["denoise"], memory=7), WorkerGroup(device_class="mine"), WorkerGroup()]
    monkeypatch.setenv("DFDASK_MEMORY_BYTES", "9e9")
    first, second, third = local_workers(groups, [FIRST, SECOND])
    assert (first.device_class, first.memory_bytes, first.stages) == ("h100-80gb-hbm3", 7, ("denoise",))
    assert first.environment["DFDASK_MEMORY_BYTES"] == "7", "its process keeps to the same"
    assert (second.device_class, second.memory_bytes, second.gpu) == ("mine", 9_000_000_000, SECOND.name)
    assert (third.memory_bytes, third.sharers) == (9_000_000_000, 2)
    monkeypatch.setenv("DFDASK_HOST_MEMORY_BYTES", "8e9")
    assert local_workers(2, [FIRST])[1].host_bytes == 8_000_000_000
    monkeypatch.setenv("DFDASK_MEMORY_BYTES", "much")
    with pytest.raises(ClusterError, match="DFDASK_MEMORY_BYTES: must be a number of bytes, got 'much'"):
        local_workers(1, [])


def test_workers_of_class_cpu_leave_the_gpus_to_others() -> None:
    encoder, denoiser = local_workers([WorkerGroup(device_class="cpu"), WorkerGroup()], [FIRST])
    assert encoder.gpu is None and encoder.environment == {"DFDASK_DEVICE": "cpu"}
    assert denoiser.gpu == FIRST.name and denoiser.sharers == 1


@given(st.lists(st.integers(1, 5), max_size=5), st.integers(0, 4))
def test_gpus_are_shared_evenly_and_never_beyond_their_memory(counts: Sequence[int], number: int) -> None:
    found = [Gpu(f"GPU-{index}", "a", 10_000 << 20) for index in range(number)]
    workers = local_workers([WorkerGroup(count=count) for count in counts], found)
    assert len(workers) == sum(counts)
    for gpu in found:
        on_it = [worker for worker in workers if worker.gpu == gpu.name]
        assert len(on_it) in (sum(counts) // number, -(-sum(counts) // number))
        assert sum(worker.memory_bytes or 0 for worker in on_it) < (gpu.memory_bytes or 0)
        assert not on_it or sum(worker.resources["GPU"] for worker in on_it) == pytest.approx(1)


def _seen_by(dask_worker: object) -> tuple[str | None, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("DFDASK_DEVICE")


@pytest.mark.usefixtures("driver")
def test_worker_processes_see_their_gpu_alone() -> None:
    fleet = LocalFleet([WorkerGroup(count=3), WorkerGroup(device_class="cpu")])
    try:
        with Client(fleet.address, set_as_default=False) as client:
            client.wait_for_workers(4, timeout=60)
            workers = client.scheduler_info()["workers"].values()
            names = sorted(name for worker in workers for name in worker["resources"] if name.startswith("class:"))
            assert names == ["class:cpu", "class:h100-80gb-hbm3", "class:l4", "class:l4"]
            seen = sorted(map(str, client.run(_seen_by).values()))
            gpu_names = sorted(str((gpu.name, None)) for gpu in (FIRST, SECOND, THIRD))
            assert seen == [*gpu_names, str((None, "cpu"))]
    finally:
        fleet.close()


@pytest.mark.usefixtures("driver")
def test_workers_that_come_later_take_the_gpu_that_fewest_use() -> None:
    fleet = LocalFleet([])
    try:
        classes = {"any": {"class:any": 1.0}, "cpu": {"class:cpu": 1.0}}
        backend = SpecBackend(fleet.cluster, classes, dict.fromkeys(classes, fleet.worker))
        with Client(fleet.address, set_as_default=False) as client:
            fleet.cluster.sync(backend.start, "any", 3)
            fleet.cluster.sync(backend.start, "cpu", 1)
            client.wait_for_workers(4, timeout=60)
            fleet.cluster.sync(backend.stop, "any", ["any-1"], 0, {"any-0", "any-1", "any-2", "cpu-3"})
            fleet.cluster.sync(backend.start, "any", 2)
            until(lambda: len(client.scheduler_info()["workers"]) == 5, 60, "the last two")
            seen = sorted(map(str, client.run(_seen_by).values()))
            expected = [FIRST.name, FIRST.name, SECOND.name, THIRD.name]
            assert seen == [*(str((name, None)) for name in expected), str((None, "cpu"))]
    finally:
        fleet.close()


@pytest.mark.usefixtures("driver")
def test_a_plan_is_for_what_a_run_would_start() -> None:
    spec = JobSpec(model={"fake": {"stages": {"make": 0.01}}}, prompts=["a"] * 4)  # type: ignore[arg-type]
    kinds = [(device.device_class, device.memory_bytes) for device in forecast(spec).workers]
    assert kinds[:2] == [("h100-80gb-hbm3", (81_000 << 20) - TAKEN_BYTES), ("l4", (23_000 << 20) - TAKEN_BYTES)]
    assert len(kinds) == 3
