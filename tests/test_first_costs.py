"""Stages of a new model have a cost before their first task has ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from tiny_models import ARGUMENTS, save_tiny

import dfdask
from dfdask.cluster import LocalFleet
from dfdask.controller import Controller, JobFacts, StageFacts
from dfdask.cost import CostModel, ItemWork
from dfdask.placement import Device


@pytest.fixture
def fleet() -> Iterator[Client]:
    fleet = LocalFleet(2)
    client = Client(fleet.address, set_as_default=False)
    yield client
    client.close()
    fleet.close()


def events(client: Client, kind: str) -> list[dict[str, Any]]:
    found = client.sync(client.scheduler.dfdask_events, number=0)["events"]
    return [event for event in found if event["event"] == kind]


def counted_flops(dask_scheduler: Any) -> dict[str, float]:
    controller = dask_scheduler.plugins["dfdask-gate"].controller
    return {stage: work.linear_flops for (_, stage), work in controller._item_work.items()}


def test_a_worker_counts_what_a_new_model_has_to_do(fleet: Client, tmp_path: Path) -> None:
    model = save_tiny("sd3", tmp_path / "model")
    # Enough steps for the counting to end before the denoising does.
    job = {"model": str(model), "arguments": {**ARGUMENTS["sd3"], "num_inference_steps": 500}, "batch": 1}
    dfdask.submit(job, prompts=["one", "two"], output=str(tmp_path / "run"), client=fleet).wait(timeout=120)
    counted = fleet.run_on_scheduler(counted_flops)
    assert set(counted) == {"encode", "denoise", "decode"} and all(flops > 0 for flops in counted.values())
    first = next(event for event in events(fleet, "TaskDone") if event["stage"] == "decode")
    assert math.isfinite(first["predicted_seconds"]) and first["predicted_seconds"] > 0
    assert first["predicted_seconds"] != pytest.approx(1.0), "which is what is said of a stage that nobody knows"


def test_what_cannot_be_counted_is_left_to_its_tasks(fleet: Client, tmp_path: Path) -> None:
    async def call(dask_scheduler: Any) -> bool:
        gate, worker = dask_scheduler.plugins["dfdask-gate"], next(iter(dask_scheduler.workers))
        await gate._first_costs._call(dask_scheduler, worker, "run", b"no pickle")
        gate._first_costs.ask("nobody's", b"no pickle")
        gate._first_costs.begin(dask_scheduler)
        return bool(gate._first_costs._calls or gate._first_costs._waiting)

    fleet.wait_for_workers(2)
    job = {"model": {"fake": {"stages": {"draw": 0.01}}}, "prompts": ["one"]}
    dfdask.submit(job, output=str(tmp_path / "first"), client=fleet).wait(timeout=60)
    assert fleet.run_on_scheduler(call) is False
    run = dfdask.submit(job, output=str(tmp_path / "second"), client=fleet).wait(timeout=60)
    assert run.progress.committed_items == 1


def test_costs_that_were_measured_stand() -> None:
    controller = Controller(CostModel())
    controller.add_device(Device("w", "H100"))
    controller.add_job(JobFacts("job", "m", (StageFacts("denoise"),), 100))
    work = {"denoise": ItemWork(1.7e15, 4.2e14, 0.0, 6e11, 28)}
    before = controller.seconds_per_item(("job", "denoise"), "H100")
    assert controller.wants_work("job") and controller.count_work("job", work) and not controller.wants_work("job")
    assert controller.seconds_per_item(("job", "denoise"), "H100") == pytest.approx(5.2, rel=0.05) != before
    controller.finished(("job", "denoise"), 1, "w", 2.0)
    assert controller.seconds_per_item(("job", "denoise"), "H100") == pytest.approx(2.0, rel=0.1)
    assert not controller.count_work("job", work), "nothing new"
    assert not controller.count_work("gone", work) and not controller.wants_work("gone")
