"""Stages are loaded before their first tasks are there, by workers that have nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dfdask
from dfdask.cluster import LocalFleet
from dfdask.spec import WorkerGroup

LOAD_SECONDS = 0.5
STAGES = {"encode": 0.02, "denoise": 0.02, "decode": 0.02}


@pytest.fixture
def three() -> Iterator[Client]:
    """Workers that hold one stage at a time."""
    fleet = LocalFleet([WorkerGroup(count=3, memory=1)])
    client = Client(fleet.address, set_as_default=False)
    client.wait_for_workers(3)
    yield client
    client.close()
    fleet.close()


def tasks(client: Client, number: int = 0) -> list[dict[str, Any]]:
    events = client.sync(client.scheduler.dfdask_events, number=number)["events"]
    return [event for event in events if event["event"] == "TaskDone"]


def test_later_stages_load_beside_the_first(three: Client, tmp_path: Path) -> None:
    fake = {"stages": STAGES, "weights": dict.fromkeys(STAGES, 1), "load_seconds": LOAD_SECONDS}
    job = {"model": {"fake": fake}, "batch": 1, "shard": 1}
    prompts = [f"prompt {number}" for number in range(60)]
    dfdask.submit(job, prompts=prompts, output=str(tmp_path / "run"), client=three).wait(timeout=60)
    done = sorted(tasks(three), key=lambda event: event["start"])
    first = {stage: next(event for event in done if event["stage"] == stage) for stage in STAGES}
    assert first["denoise"]["load_seconds"] == first["decode"]["load_seconds"] == 0
    assert len({event["worker"] for event in first.values()}) == 3
    loads = [worker["load_seconds"] for worker in three.sync(three.scheduler.dfdask_state)["workers"]]
    assert all(seconds >= LOAD_SECONDS for seconds in loads), "it counts as loading all the same"


def test_a_stage_that_cannot_be_loaded_is_left_to_its_task(three: Client, tmp_path: Path) -> None:
    async def call(dask_scheduler: Any) -> list[bool]:
        """With a reference that nobody can read, as the gate calls."""
        gate = dask_scheduler.plugins["dfdask-gate"]
        warm_up, worker = gate._warm_up, next(iter(dask_scheduler.workers))
        run, stage = "bad", "encode"
        warm_up.refs[run] = b"no pickle"
        await warm_up._call(dask_scheduler, worker, (run, stage))
        return [worker in warm_up._calls, gate.ledger.workers[worker].idle_since is None]

    job = {"model": {"fake": {"stages": STAGES}}, "prompts": ["one"]}
    dfdask.submit(job, output=str(tmp_path / "first"), client=three).wait(timeout=60)
    assert three.run_on_scheduler(call) == [False, False]
    run = dfdask.submit(job, output=str(tmp_path / "second"), client=three).wait(timeout=60)
    assert run.progress.committed_items == 1


def test_a_worker_that_takes_turns_loads_what_its_work_needs_first(tmp_path: Path) -> None:
    fleet = LocalFleet([WorkerGroup(count=1, memory=1)])
    client = Client(fleet.address, set_as_default=False)
    fake = {"stages": STAGES, "weights": dict.fromkeys(STAGES, 1), "load_seconds": LOAD_SECONDS}
    job = {"model": {"fake": fake}, "batch": 1, "shard": 1, "prompts": ["one"]}
    for name in ("first", "second"):  # of the second the costs are known
        dfdask.submit(job, output=str(tmp_path / name), client=client).wait(timeout=60)
    loads = [event["load_seconds"] >= LOAD_SECONDS for event in tasks(client)]
    (worker,) = client.sync(client.scheduler.dfdask_state)["workers"]
    client.close()
    fleet.close()
    assert loads == [True] * 6 and worker["load_seconds"] < 7 * LOAD_SECONDS, "nothing was loaded in vain"
