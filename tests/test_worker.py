"""What a worker does with a micro-batch and a shard, on a real worker process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.system import MEMORY_LIMIT
from stored import new_run

from dfdask.errors import ModelError, StorageError
from dfdask.items import Item
from dfdask.spec import FakeStages, JobSpec
from dfdask.stages.batch import Batch, Group
from dfdask.stages.budget import HOST_MEMORY_BYTES, HOST_PART, allowed
from dfdask.stages.fake import fake_component
from dfdask.stages.model import ModelRef, model_ref
from dfdask.store import RunStore
from dfdask.targets import Location
from dfdask.telemetry import TELEMETRY
from dfdask.worker import _place, run_stage, write_shard

FAKE = ModelRef("fake", "fake", "float32", "cpu", False, fake=FakeStages(height=6, width=5))
NOWHERE = ModelRef("no/model/here", "", "float32", "cpu", False)
ITEMS = tuple(Item(row, f"id-{row}", "a cat", row, {}) for row in range(3, 6))


def call(client: Client, function: Any, *values: Any) -> Any:
    return client.submit(function, *values, pure=False).result(timeout=30)


def batch_of(pictures: list[Any], **more: Any) -> Batch:
    items = ITEMS[: len(pictures)]
    return Batch((Group(items, pictures),), more.pop("failures", {}), more.pop("seconds", {}), **more)


def picture(value: int, *shape: int) -> Any:
    return np.full(shape or (6, 5, 3), value, np.uint8)


def test_items_enter_at_the_first_stage_and_batches_go_on(client: Client) -> None:
    batch = call(client, run_stage, FAKE, "encode", ITEMS)
    assert [group.items for group in batch.groups] == [ITEMS]
    done = call(client, run_stage, FAKE, "decode", call(client, run_stage, FAKE, "denoise", batch))
    assert set(done.seconds) == {"encode", "denoise", "decode"}
    assert [one.shape for one in done.groups[0].state] == [(6, 5, 3)] * 3


def test_the_scheduler_learns_what_a_task_took(client: Client) -> None:
    client.sync(client.scheduler.start_task_metadata, name="test")
    call(client, run_stage, FAKE, "encode", ITEMS)
    found = client.sync(client.scheduler.stop_task_metadata, name="test")
    (told,) = (metadata["dfdask"] for metadata in found["metadata"].values())
    assert told["seconds"] >= 0 and told["load_seconds"] == 0 and told["start"] > 0
    assert FAKE.fake is not None and fake_component(FAKE.fake, "encode") not in told["holds"]


def test_the_scheduler_learns_how_many_items_came_through(client: Client) -> None:
    settings = FakeStages(fail=["id-4"], fail_stage="encode")
    client.sync(client.scheduler.start_task_metadata, name="test")
    batch = call(client, run_stage, replace(FAKE, fake=settings), "encode", ITEMS)
    found = client.sync(client.scheduler.stop_task_metadata, name="test")
    (told,) = (metadata["dfdask"] for metadata in found["metadata"].values())
    assert len(batch.failures) == 1 and told["items"] == len(ITEMS) - 1


def test_only_a_load_is_told_as_one(client: Client) -> None:
    settings = FakeStages(weights={"encode": 1, "denoise": 1}, load_seconds=0.05)
    ref = replace(FAKE, fake=settings)
    client.sync(client.scheduler.start_task_metadata, name="test")
    worker = next(iter(client.scheduler_info()["workers"]))
    for stage in ("encode", "denoise", "denoise"):
        client.submit(run_stage, ref, stage, ITEMS, pure=False, workers=worker).result(timeout=30)
    found = client.sync(client.scheduler.stop_task_metadata, name="test")
    tasks = sorted((metadata["dfdask"] for metadata in found["metadata"].values()), key=lambda told: told["start"])
    assert [told["load_seconds"] >= 0.05 for told in tasks] == [True, True, False]
    assert tasks[2]["load_seconds"] == 0, "a look at weights that are there is none"


def test_reading_a_real_model_is_told_as_a_load(client: Client) -> None:
    ref = model_ref(JobSpec(model="bundled", prompts=["a cat"]))
    client.sync(client.scheduler.start_task_metadata, name="test")
    worker = next(iter(client.scheduler_info()["workers"]))
    for _ in range(2):
        client.submit(run_stage, ref, "encode", ITEMS, pure=False, workers=worker).result(timeout=60)
    found = client.sync(client.scheduler.stop_task_metadata, name="test")
    tasks = sorted((metadata["dfdask"] for metadata in found["metadata"].values()), key=lambda told: told["start"])
    assert [told["load_seconds"] > 0 for told in tasks] == [True, False]


def test_a_worker_of_several_threads_runs_one_stage_task_at_a_time() -> None:
    """One that has just come may get two, before it offers what they would have to share."""
    ref = replace(FAKE, fake=FakeStages(stages={"encode": 0.1, "denoise": 0.1, "decode": 0.0}))
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, memory_limit=0, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.sync(client.scheduler.start_task_metadata, name="test")
        client.gather([client.submit(run_stage, ref, "encode", ITEMS, pure=False) for _ in range(2)])
        found = client.sync(client.scheduler.stop_task_metadata, name="test")
    first, second = sorted(
        (metadata[TELEMETRY] for metadata in found["metadata"].values()), key=lambda told: told["start"]
    )
    assert first["seconds"] >= 0.1 and second["start"] >= first["start"] + first["seconds"] - 0.01


@pytest.mark.parametrize(("limit", "expected"), [("2GB", 1_000_000_000), (0, int(MEMORY_LIMIT * HOST_PART))])
def test_weights_keep_to_what_dask_allows_its_worker(limit: str | int, expected: int) -> None:
    def known() -> tuple[int | None, str | None]:
        return allowed(HOST_MEMORY_BYTES), os.environ.get(HOST_MEMORY_BYTES)

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, memory_limit=limit, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        call(client, run_stage, FAKE, "encode", ITEMS)
        assert set(client.run(known).values()) == {(expected, None)}, "nothing is left in the environment of others"


def test_a_problem_is_handed_on_to_the_client(client: Client, local: Location) -> None:
    batch = call(client, run_stage, NOWHERE, "encode", ITEMS)
    assert isinstance(batch.problem, ModelError) and "no/model/here" in str(batch.problem)
    later = call(client, run_stage, NOWHERE, "denoise", batch)
    assert str(later.problem) == str(batch.problem) and later.groups == ()
    receipt = call(client, write_shard, local, 1, {}, [later])
    assert receipt["shard"] == 1 and isinstance(receipt["error"], ModelError)
    assert not local.path.exists()


def test_a_shard_is_written_with_its_failures(client: Client, local: Location) -> None:
    new_run(local)
    done = batch_of([picture(7), ValueError("nan"), picture(9, 2, 4, 3)], seconds={"decode": 1.5})
    receipt = call(client, write_shard, local, 1, {"versions": {"x": "1"}}, [done])
    assert {name: receipt[name] for name in ("shard", "items", "failed_items", "stale")} == {
        "shard": 1,
        "items": 3,
        "failed_items": 1,
        "stale": False,
    }
    data = RunStore.open(local).dataset().load()
    assert data["status"].values.tolist() == [0, 0, 0, 1, 2, 1, 0]
    assert data["error"].values[4] == "decode: ValueError: nan"
    assert (data["image"].values[3] == 7).all() and not data["image"].values[4].any()
    assert (data["image"].values[5, :2, :4] == 9).all() and data["image"].values[5].sum() == 9 * 24
    (commit,) = RunStore.open(local).commits()
    assert commit["stage_seconds"] == {"decode": 1.5} and commit["versions"] == {"x": "1"}
    again = call(client, write_shard, local, 1, {}, [batch_of([picture(1)] * 3)])
    assert again["stale"], "another writer was first"
    assert (RunStore.open(local).dataset()["image"].values[3] == 7).all()


def test_what_was_committed_before_its_worker_died_is_not_computed_again(client: Client, local: Location) -> None:
    new_run(local)
    pictures = batch_of([picture(7), ValueError("nan"), picture(9)], seconds={"decode": 1.5})
    call(client, write_shard, local, 1, {}, [pictures])

    def once_more(work: Any, shard: int) -> Batch:
        with dask.annotate(**{TELEMETRY: {"again": True}}):
            found: Batch = call(client, run_stage, FAKE, "encode", work, local, shard)
        return found

    assert not once_more(ITEMS, 0).committed, "another shard, which is not there yet"
    assert not call(client, run_stage, FAKE, "encode", ITEMS, local, 1).committed, "nobody died: nobody looks"
    skipped = once_more(ITEMS, 1)
    assert skipped.committed and not skipped.groups and not skipped.seconds
    later = call(client, run_stage, FAKE, "denoise", skipped, local, 1)
    receipt = call(client, write_shard, local, 1, {}, [later, batch_of([picture(1)] * 3)])
    assert receipt["stale"] and (receipt["items"], receipt["failed_items"]) == (3, 1)
    assert receipt["stage_seconds"] == {"decode": 1.5}
    assert (RunStore.open(local).dataset()["image"].values[3] == 7).all()


def test_items_that_failed_in_an_earlier_stage_are_rows(client: Client, local: Location) -> None:
    new_run(local)
    failed = Batch((Group(ITEMS[:1], [picture(7)]),), {4: "encode: no", 5: "denoise: never"})
    assert call(client, write_shard, local, 1, {}, [failed])["failed_items"] == 2
    data = RunStore.open(local).dataset()
    assert data["error"].values[3:6].tolist() == ["", "encode: no", "denoise: never"]


def test_an_output_that_is_not_there_is_a_receipt(client: Client, local: Location) -> None:
    receipt = call(client, write_shard, local, 1, {}, [batch_of([picture(1)] * 3)])
    assert receipt["shard"] == 1 and isinstance(receipt["error"], StorageError)


@pytest.mark.parametrize("shape", [(7, 5, 3), (6, 6, 3), (6, 5), (2, 6, 5, 3), (6, 5, 4)])
def test_a_picture_that_does_not_fit_is_a_failure(shape: tuple[int, ...]) -> None:
    room = np.zeros((6, 5, 3), np.uint8)
    assert f"{shape}, the run has room for (6, 5, 3)" in _place(room, picture(1, *shape))
    assert not room.any()


def test_errors_travel_with_their_kind(client: Client, tmp_path: Path) -> None:
    batch = Batch((), problem=StorageError(f"cannot write {tmp_path}"))
    found = call(client, _same, batch)
    assert type(found.problem) is StorageError and str(found.problem) == f"cannot write {tmp_path}"


def _same(batch: Batch) -> Batch:
    return batch
