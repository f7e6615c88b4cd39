"""Clusters as dfdask starts them, and what it says where it cannot."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest
from distributed import Client
from fleet import Fleet, lingering, until

import dfdask
from dfdask import cluster
from dfdask.cluster import (
    LocalFleet,
    _interrupts_kept_out,
    check_scheduler,
    run_scheduler,
)
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
            assert {worker["nthreads"] for worker in workers} == {2}
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


def _news() -> tuple[str, ...]:
    """Which of two messages the worker's log lets through."""
    logger = logging.getLogger("distributed.worker")
    said = ("Failed to communicate with scheduler during heartbeat.", "Compute Failed")
    records = [logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None) for text in said]
    return tuple(record.getMessage() for record in records if logger.filter(record))


def test_a_worker_that_takes_long_to_die_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A GPU's worker was not gone five seconds after SIGKILL; the run waited for ever, below a traceback."""
    before = set(psutil.Process().children(recursive=True))
    model = {"fake": {"stages": {"encode": 0.0, "denoise": 1.0, "decode": 0.0}}}
    run = dfdask.submit(model=model, prompts=["a cat"] * 4, output=f"{tmp_path}/run", workers=1, shard=1, batch=1)
    until(lambda: run.progress.committed_shards > 0, 60, "the first shard")
    started = set(psutil.Process().children(recursive=True)) - before
    (worker,) = [one for one in started if "spawn_main" in str(one.cmdline())]
    with lingering(worker.pid):
        run.wait(timeout=60)
        assert run.progress.phase == "finished"
        assert worker.status() == psutil.STATUS_ZOMBIE
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    worker.wait(10)


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


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dashboard_whose_port_is_taken_gets_another_one(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word: a warning would be an error here. (Dask leaves the socket open that it could not bind.)"""
    monkeypatch.setattr(cluster, "DASHBOARD_PORT", taken)
    fleet = LocalFleet(1)
    try:
        assert fleet.cluster.dashboard_link.endswith("/status")
        assert f":{taken}/" not in fleet.cluster.dashboard_link
    finally:
        fleet.close()


def test_a_script_that_its_workers_cannot_import_is_told_how(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    job = f"model={{'fake': {{}}}}, prompts=['a'], output={str(tmp_path / 'run')!r}"
    script.write_text(f"import dfdask\ndfdask.submit({job})\n")
    told = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert told.returncode == 1 and told.stderr.count("Traceback") == 1
    assert "must submit below `if __name__ == '__main__':`" in told.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_interrupts_come_back_afterwards() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(ValueError), _interrupts_kept_out():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise ValueError
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("orderly", [True, False])
def test_workers_say_that_their_scheduler_went_away(tmp_path: Path, orderly: bool) -> None:
    """So that what supervises them starts them again; not where they were asked to end."""
    fleet = Fleet(tmp_path)
    try:
        fleet.up()
        with Client(fleet.address, set_as_default=False) as client:
            client.wait_for_workers(len(fleet.workers), timeout=60)
            if orderly:
                client.shutdown()
        if not orderly:
            assert fleet.scheduler is not None
            fleet.scheduler.kill()
        workers = [process for process in fleet.workers if process]
        assert {process.wait(60) for process in workers} == {0 if orderly else 4}, fleet.log("workers.log")
        told = fleet.log("workers.log", 100_000)
        assert told.count(f"Error: the scheduler at {fleet.address} went away") == (0 if orderly else len(workers)), (
            told
        )
    finally:
        fleet.down()
