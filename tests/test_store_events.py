"""The events of a run, beside its data on a disk and in S3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import zarr
from stored import everything, new_run, put

from dfdask.events import Event, JobStarted, RolesChanged, ShardWritten, TaskDone, WorkerJoined, WorkerLeft
from dfdask.export import export_run
from dfdask.store import RunStore
from dfdask.store_events import EventLog
from dfdask.store_objects import Objects
from dfdask.summary import status_of
from dfdask.targets import Location

LIVES = [
    JobStarted(1.0, run="r", name="demo", output="runs/demo", items=7),
    WorkerJoined(2.0, worker="tcp://a", device_class="cpu", memory_bytes=1 << 30),
    RolesChanged(3.0, "tcp://a", {}, {"denoise": 1.0, "décode": 0.0}, "new worker", "replicas", 60.0, float("inf")),
    WorkerLeft(4.0, worker="tcp://a", lost_tasks=2),
]


def task(when: float, worker: int = 0, predicted: float = 0.5, seconds: float = 0.4) -> dict[str, Any]:
    start = when - seconds
    return TaskDone(when, "r", "denoise", f"tcp://w{worker}", 4, start, seconds, 0.1, predicted, 1000).as_dict()


def dicts(events: list[Event]) -> list[dict[str, Any]]:
    return [event.as_dict() for event in events]


def test_what_was_saved_comes_back_in_order(location: Location) -> None:
    store = new_run(location)
    assert store.events() == []
    store.append_events([])
    assert not any("jsonl" in key for key in everything(location))
    store.append_events(dicts(LIVES[2:]))
    store.append_events(dicts(LIVES[:2]))
    found = RunStore.open(location).events()
    assert [event["event"] for event in found] == ["JobStarted", "WorkerJoined", "RolesChanged", "WorkerLeft"]
    assert found[0] == LIVES[0].as_dict()
    assert found[2] == {**asdict(LIVES[2]), "event": "RolesChanged", "stay_seconds": None}, "JSON has no infinity"


def test_zarr_and_xarray_do_not_wonder_about_them(location: Location) -> None:
    store = new_run(location)
    store.append_events(dicts(LIVES))
    put(store, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.dataset()["status"].values.tolist() == [1, 1, 1, 0, 0, 0, 0]
        group = zarr.open_group(Objects(location).zarr(), mode="r", use_consolidated=False)
        assert {"image", "events"} <= {name for name, _ in group.members()}
    store.verify()
    assert store.verify() == []


def test_they_are_no_part_of_the_data(local: Location, tmp_path: Path) -> None:
    store = new_run(local)
    for shard in range(3):
        put(store, shard)
    before = status_of(store).stored_bytes
    store.append_events([task(float(second)) for second in range(500)])
    assert status_of(store).stored_bytes == before
    assert store.sweep(older_than_seconds=0) == 0 and len(store.events()) == 500
    export_run(store, "png", tmp_path / "png")
    assert not [path for path in (tmp_path / "png").rglob("*") if "event" in path.name]


def test_sums_keep_every_total(local: Location) -> None:
    store, log = new_run(local), EventLog(Objects(local))
    tasks = [
        task(100.0 + place * 0.05, place % 400, float("nan") if place % 3 else 0.5, 0.1 + place % 7)
        for place in range(60_000)
    ]
    shards = [ShardWritten(event["when"], "r", place, 8, place % 2, (f"error {place}",), {0: b"jpg"}).as_dict()
              for place, event in enumerate(tasks[::4])]  # fmt: skip
    for start in range(0, len(tasks), 4000):
        log.append(tasks[start : start + 4000])
        log.append(shards[start // 4 : start // 4 + 1000])
    found = store.events()
    rows = [event for event in found if event["event"] == "TaskDone"]
    assert len(rows) < len(tasks) / 2
    assert sum(row["events"] for row in rows) == len(tasks)
    for name in ("items", "nbytes", "seconds", "load_seconds"):
        assert sum(row[name] for row in rows) == pytest.approx(sum(event[name] for event in tasks), rel=1e-4)
    known = [event for event in tasks if event["predicted_seconds"] == 0.5]
    told = [row for row in rows if row["predicted_seconds"] is not None]
    assert sum(row["predicted_seconds"] for row in told) == pytest.approx(0.5 * len(known), rel=1e-4)
    assert sum(row["seconds"] for row in told) == pytest.approx(sum(event["seconds"] for event in known), rel=1e-4)
    assert max(row["when"] for row in rows) == pytest.approx(tasks[-1]["when"], abs=1e-3)
    assert all(row["start"] < row["first"] <= row["when"] for row in rows)
    written = [event for event in found if event["event"] == "ShardWritten"]
    assert sum(event["events"] for event in written) == len(shards)
    assert sum(event["failed_items"] for event in written) == sum(event["failed_items"] for event in shards)
    assert not any("thumbnails" in event for event in written)
    assert all(0 < len(event["errors"]) <= 8 for event in written)


def test_a_million_items_take_megabytes(local: Location) -> None:
    """In batches of 25 on 50 workers in 14 hours. Smaller batches are more tasks, not more sums."""
    new_run(local)
    log, step = EventLog(Objects(local)), 50_000 / 40_000
    for start in range(0, 40_000, 1000):
        log.append({**task(1e9 + place * step, place * 7 % 50), "items": 25} for place in range(start, start + 1000))
    objects = {key: len(data) for key, data in everything(local).items() if key.endswith(".jsonl")}
    assert 10 < len(objects) < 500
    assert sum(objects.values()) < 6e6
    assert sum(event["items"] for event in RunStore.open(local).events()) == 1_000_000


def test_the_newest_object_is_put_again_until_it_is_full(location: Location) -> None:
    store, log = new_run(location), EventLog(Objects(location))
    for second in range(0, 200, 10):
        log.append([task(second)])
        assert len(store.events()) == second / 10 + 1, "everything so far is safe at any time"
    assert sum(key.endswith(".jsonl") for key in everything(location)) == 3


def test_what_happens_all_the_time_is_counted_only(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfdask.store_events.MOST_OF_A_KIND", 10)
    store, log = new_run(local), EventLog(Objects(local))
    log.append(RolesChanged(float(place), "w", {}, {}, "", "", 1.0, 1.0).as_dict() for place in range(25))
    log.append(dicts(LIVES[:2]))
    log.append(RolesChanged(500.0 + place, "w", {}, {}, "", "", 1.0, 1.0).as_dict() for place in range(5))
    found = store.events()
    assert sum(event["event"] == "RolesChanged" for event in found) == 10
    assert sum(event["event"] == "JobStarted" for event in found) == 1
    dropped = [event["dropped"] for event in found if event["event"] == "EventsDropped"]
    assert dropped == [{"RolesChanged": 15}, {"RolesChanged": 5}]


def test_two_clients_that_follow_the_same_run_do_not_count_twice(location: Location) -> None:
    store = new_run(location)
    first, second = EventLog(Objects(location)), EventLog(Objects(location))
    first.append([task(10.0), task(20.0)])
    second.append([task(15.0), task(20.0)])
    first.append([task(30.0)])
    second.append([task(30.0), task(40.0)])
    assert [event["when"] for event in store.events()] == [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b'{"event": "TaskDone", "rows": 2, "same": {}, "columns": {"when": [1]}}', b"[]"]
)
def test_objects_that_cannot_be_read_are_left_out(local: Location, data: bytes) -> None:
    store = new_run(local)
    store.append_events(dicts(LIVES))
    bad = local.path / "events" / "20260101T000000-0000-000000.jsonl"
    bad.write_bytes(data)
    (local.path / "events" / "notes.txt").write_text("mine")
    if not data:
        assert len(store.events()) == 4
        return
    with pytest.warns(UserWarning, match="20260101T000000-0000-000000.jsonl cannot be read"):
        assert len(store.events()) == 4


def test_storage_that_goes_away_loses_nothing(local: Location) -> None:
    store, log = new_run(local), EventLog(Objects(local))
    folder, aside = local.path / "events", local.path.with_name("aside")
    log.append([task(1.0)])
    folder.rename(aside)
    folder.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="not saved for now"):
        log.append([task(2.0)])
    log.append([task(500.0)])  # one warning is enough
    folder.unlink()
    aside.rename(folder)
    log.append([task(501.0)])
    assert [event["when"] for event in store.events()] == [1.0, 2.0, 500.0, 501.0]


WRITER = """
import sys
from dfdask.store import RunStore
from dfdask.targets import resolve_output
store = RunStore.open(resolve_output(sys.argv[1]))
for number in range(100_000):
    store.append_events([{"event": "WorkerJoined", "when": number * 30.0, "worker": str(number)}])
    print(number, flush=True)
"""


def test_a_killed_client_loses_nothing_that_it_saved(local: Location) -> None:
    store = new_run(local)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(local.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.stdout]
    process.stdout.close()
    process.wait()
    found = [int(event["worker"]) for event in store.events()]
    assert found[: len(said)] == said and len(found) <= len(said) + 1
