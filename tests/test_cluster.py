"""Clusters as dfdask starts them, and what it says where it cannot."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest
from distributed import Client
from fleet import until

from dfdask import cluster
from dfdask.cluster import (
    LocalFleet,
    _free_port,
    _interrupts_kept_out,
    available_cores,
    check_scheduler,
    gpu_class,
    run_scheduler,
)
from dfdask.cost import CostModel
from dfdask.errors import ClusterError
from dfdask.spec import WorkerGroup


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on, and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


def test_workers_have_the_roles_of_their_groups_and_end_with_the_fleet() -> None:
    before = set(psutil.Process().children(recursive=True))
    fleet = LocalFleet([WorkerGroup(count=2, stages=["encode", "decode"]), WorkerGroup()])
    try:
        with Client(fleet.address, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=60)
            workers = client.scheduler_info()["workers"].values()
            roles = sorted(sorted(worker["resources"]) for worker in workers)
            assert roles == [[], ["role:decode", "role:encode"], ["role:decode", "role:encode"]]
            assert {worker["nthreads"] for worker in workers} == {1}
            assert {worker["memory_limit"] for worker in workers} == {0}
            processes = client.run(os.getpid)
            assert len(set(processes.values()) - {os.getpid()}) == 3
            assert set(client.run(_news).values()) == {("Compute Failed",)}
            extensions = client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler.extensions))
            assert "stealing" not in extensions, "the gate alone places tasks"
    finally:
        fleet.close()
    started = set(psutil.Process().children(recursive=True)) - before
    until(
        lambda: not [one for one in started if one.is_running() and "spawn_main" in str(one.cmdline())], 10, "the end"
    )
    assert dask.config.get("distributed.scheduler.work-stealing") is True, "settings of others are left alone"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's tool that knows one GPU, and what it was asked."""
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    tool.write_text(
        f'#!/bin/sh\necho "$@" > {asked}\ncase "$*" in *--id=7*) exit 6;; esac\necho "NVIDIA H100 80GB HBM3"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return asked


def test_the_class_of_a_gpu_is_found_out(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_class() == "h100-80gb-hbm3" and CostModel().rates_of("h100-80gb-hbm3") is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f,GPU-4a")
    assert gpu_class() == "h100-80gb-hbm3" and driver.read_text().endswith("--id=GPU-3f\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpu_class() is None, "a driver that does not know it"
    monkeypatch.setenv("PATH", "")
    assert gpu_class() is None


@pytest.mark.usefixtures("driver")
def test_workers_beside_a_gpu_are_of_its_class_unless_they_compute_on_the_cpu() -> None:
    for device, expected in (("auto", [["class:h100-80gb-hbm3"], ["class:mine"]]), ("cpu", [[], ["class:mine"]])):
        fleet = LocalFleet([WorkerGroup(), WorkerGroup(device_class="mine")], device)
        try:
            with Client(fleet.address, set_as_default=False) as client:
                client.wait_for_workers(2, timeout=60)
                workers = client.scheduler_info()["workers"].values()
                assert sorted(sorted(worker["resources"]) for worker in workers) == expected
        finally:
            fleet.close()


def _news() -> tuple[str, ...]:
    """Which of two messages the worker's log lets through."""
    logger = logging.getLogger("distributed.worker")
    said = ("Failed to communicate with scheduler during heartbeat.", "Compute Failed")
    records = [logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None) for text in said]
    return tuple(record.getMessage() for record in records if logger.filter(record))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "no address", "http://127.0.0.1:9", "tcp://", "", "a:b"])
def test_an_address_without_a_scheduler_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ClusterError, match="nothing answers at") as caught:
        asyncio.run(check_scheduler(address))
    assert repr(address) in str(caught.value) and "\n" not in str(caught.value)
    assert "dfdask scheduler" in str(caught.value)


def test_who_listens_and_is_no_scheduler_is_named(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ClusterError, match=f"nothing answers at 'tcp://127.0.0.1:{taken}'"):
        asyncio.run(check_scheduler(f"tcp://127.0.0.1:{taken}"))


def test_a_scheduler_whose_port_is_taken_says_so(taken: int) -> None:
    with pytest.raises(ClusterError, match=f"cannot listen on 127.0.0.1:{taken} .*choose another --port"):
        run_scheduler("127.0.0.1", taken, "127.0.0.1:0")


def test_a_port_that_is_taken_becomes_any_free_one(taken: int) -> None:
    assert _free_port(taken) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert _free_port(free) == free


def test_interrupts_come_back_afterwards() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(ValueError), _interrupts_kept_out():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise ValueError
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_as_many_workers_as_cores() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
