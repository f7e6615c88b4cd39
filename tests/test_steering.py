"""Pause, resume, stop and retry: what a person does to a job in mid-run."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from fleet import until

from dfdask import cluster
from dfdask.errors import ClusterError, DfdaskError, StorageError
from dfdask.events import ShardCommitted
from dfdask.run import Run, open_run, submit
from dfdask.stages.fake import fake_pixels
from dfdask.targets import Location


def job(folder: Path, items: int = 60, **fake: Any) -> dict[str, Any]:
    prompts = [{"prompt": f"prompt {number}", "id": f"item-{number}"} for number in range(items)]
    return {"model": {"fake": fake}, "prompts": prompts, "output": str(folder / "run"), "batch": 2, "shard": 2}


def in_flight(run: Run) -> int:
    return sum(stage.queued + stage.running for stage in run.progress.stages)


def commits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "run/commits").glob("[0-9]*.json")}


def test_pause_hands_out_nothing_more_and_resume_goes_on(client: Client, tmp_path: Path) -> None:
    run = submit(**job(tmp_path, items=200, stages={"encode": 0.0, "denoise": 0.01, "decode": 0.0}), client=client)
    until(lambda: run.progress.committed_items and in_flight(run), 30, "a first commit")
    run.pause()
    assert run.progress.phase == "paused"
    time.sleep(1)  # what the scheduler says of the stages is up to half a second old
    until(lambda: not in_flight(run), 30, "what was handed out")
    time.sleep(1)
    there = run.progress.committed_items
    assert 0 < there < 200
    time.sleep(1)
    assert run.progress.committed_items == there and len(commits(tmp_path)) * 2 == there
    with pytest.raises(TimeoutError):
        run.wait(timeout=0.1)
    run.resume()
    assert run.progress.phase == "running"
    run.wait(timeout=60)
    assert run.progress.committed_items == 200
    run.pause()
    assert run.progress.phase == "finished", "there is nothing to pause any more"


def test_an_interrupted_wait_ends_no_job(client: Client, tmp_path: Path) -> None:
    run = submit(**job(tmp_path, items=200, stages={"encode": 0.0, "denoise": 0.05, "decode": 0.0}), client=client)
    interrupt = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run.wait(30)
    with pytest.raises(TimeoutError):
        run.wait(0.1)
    with pytest.raises(DfdaskError, match="is running; wait for it"):
        run.retry_failed()
    run.stop()
    assert run.wait(60).progress.phase == "stopped"


def test_a_pause_has_no_speed_and_takes_nothing_off_it(client: Client, tmp_path: Path) -> None:
    run = submit(**job(tmp_path, items=200, stages={"encode": 0.0, "denoise": 0.02, "decode": 0.0}), client=client)
    until(lambda: run.progress.committed_items > 20, 30, "a part")
    run.pause()
    assert (run.progress.items_per_second, run.progress.eta_seconds) == (None, None)
    paused = run.progress
    time.sleep(4)
    run.resume()
    assert (run.progress.items_per_second or 0.0) >= paused.committed_items / paused.elapsed_seconds * 0.9
    run.stop()
    run.wait(60)


def test_a_paused_job_can_be_stopped_and_gone_on_with(client: Client, tmp_path: Path) -> None:
    fields = job(tmp_path, items=200, stages={"encode": 0.0, "denoise": 0.01, "decode": 0.0})
    run = submit(**fields, client=client)
    run.pause()
    run.stop()
    assert run.progress.phase == "stopping"
    run.wait(timeout=60)
    assert run.progress.phase == "stopped" and run.progress.committed_items < 200
    assert submit(**fields, client=client).wait(timeout=60).progress.committed_items == 200


def test_failed_items_are_done_again_once_the_cause_is_mended(client: Client, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    fields = job(tmp_path, fail=["item-5", "item-33"], fail_until=str(mended))
    run = submit(**fields, client=client).wait(timeout=60)
    before = commits(tmp_path)
    assert [entry["id"] for entry in run.failures()] == ["item-5", "item-33"]
    same = run.retry_failed().wait(timeout=60)
    assert len(same.failures()) == 2, "the cause is still there"
    mended.touch()
    again = same.retry_failed().wait(timeout=60)
    assert (again.failures(), again.progress.failed_items, again.progress.resumed_items) == ([], 0, 56)
    changed = {name for name, data in commits(tmp_path).items() if data != before[name]}
    assert changed == {"00000002.json", "00000016.json"}, "other shards are left as they are"
    data = again.dataset().load()
    assert (data.status.values == 1).all()
    for row, seed in enumerate(data.seed.values):
        assert (data.image.values[row] == fake_pixels(int(seed), 8, 8)).all()
    assert again.store.verify() == []
    assert again.retry_failed().wait(timeout=60).progress.resumed_items == 60, "nothing has failed, nothing is done"


def test_a_retry_goes_where_the_run_is(s3: Location, tmp_path: Path) -> None:
    """Another server has a bucket of the same name; by its URL alone nobody can tell which of them is meant."""
    here = (tmp_path / "storage/bucket.yaml").read_text()
    (tmp_path / "storage/another.yaml").write_text(re.sub("endpoint: .*", "endpoint: http://127.0.0.1:9", here))
    fields = {**job(tmp_path, items=4, fail=["item-1"]), "output": f"bucket/{s3.name}", "workers": 1}
    run = submit(**fields).wait(timeout=60)
    again = run.retry_failed().wait(timeout=60)
    assert again.location == run.location == s3 and again.progress.resumed_items == 2
    with pytest.raises(StorageError, match="may be in any of another, bucket; write <target>/"):
        open_run(str(s3))


def test_a_retry_takes_nothing_back_before_it_has_something_better(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    fields = job(tmp_path, fail=["item-5", "item-33"], stages={"encode": 0.0, "denoise": 0.2, "decode": 0.0})
    submit(**fields, client=client).wait(timeout=60)
    before = commits(tmp_path)
    with pytest.raises(ClusterError):
        submit(**fields, scheduler="tcp://127.0.0.1:1", retry_failed=True)
    assert commits(tmp_path) == before
    run = submit(**fields, client=client, retry_failed=True)
    assert (run.progress.committed_items, run.progress.failed_items) == (56, 0), "the others are to be done"
    run.stop()
    run.wait(timeout=60)
    there = run.progress
    assert (there.phase, there.committed_items, there.failed_items) == ("stopped", 60, 2)
    assert len(commits(tmp_path)) == 30 and run.store.verify() == []


def test_a_stop_drops_what_is_not_begun(client: Client, tmp_path: Path) -> None:
    fields = job(tmp_path, items=200, stages={"encode": 0.0, "denoise": 0.1, "decode": 0.0})
    run = submit(**fields, client=client)
    until(lambda: len(commits(tmp_path)) > 2 and in_flight(run) > 20, 30, "a full window")
    ahead, there = in_flight(run), run.progress.committed_items
    run.stop()
    run.wait(timeout=60)
    assert run.progress.committed_items - there < ahead / 2, "of what waited for workers nothing was done any more"


def test_two_processes_at_the_same_run_share_its_work(client: Client, tmp_path: Path) -> None:
    fields = job(tmp_path, items=400, stages={"encode": 0.0, "denoise": 0.05, "decode": 0.0})
    told: list[ShardCommitted] = []
    runs = [submit(**fields, client=client, on_commit=told.append), submit(**fields, workers=2, on_commit=told.append)]
    for run in runs:
        assert run.wait(timeout=100).progress.committed_items == 400
    assert sum(not one.stale for one in told) == 200 == len(commits(tmp_path)) and runs[0].store.verify() == []
    done = [entry for entry in runs[0].store.events() if entry["event"] == "TaskDone" and entry["stage"] == "denoise"]
    assert sum(entry["items"] for entry in done) < 1.9 * 400, "each has left things to the other"


def test_a_stop_that_comes_too_late_is_none(client: Client, tmp_path: Path) -> None:
    fields = job(tmp_path, items=2, stages={"encode": 0.0, "denoise": 1.0, "decode": 0.0})
    run = submit(**fields, client=client)
    until(lambda: run.progress.stages and run.progress.stages[1].running, 30, "the last stage but one")
    run.stop()
    run.wait(timeout=60)
    assert run.progress.phase in ("finished", "stopped")
    assert (run.progress.phase == "finished") == (run.progress.committed_items == 2)


def test_a_resumed_job_counts_its_own_speed(client: Client, tmp_path: Path) -> None:
    fields = job(tmp_path, items=120, stages={"encode": 0.0, "denoise": 0.1, "decode": 0.0})
    run = submit(**fields, client=client)
    until(lambda: len(commits(tmp_path)) > 20, 30, "a part")
    run.stop()
    run.wait(timeout=60)
    again = submit(**fields, client=client)
    until(lambda: again.progress.items_per_second, 30, "a speed")
    there = again.progress
    left = there.items - there.committed_items
    assert there.eta_seconds is not None and there.items_per_second is not None
    assert there.items_per_second < 2 * 2 / 0.1, "two workers, an item each 0.1 s"
    assert there.eta_seconds > left / 2 / there.items_per_second > 0
    again.wait(timeout=60)
    assert [(stage.queued, stage.running, stage.done) for stage in again.progress.stages] == [(0, 0, 120)] * 3


def test_what_cannot_be_retried(client: Client, tmp_path: Path) -> None:
    run = submit(**job(tmp_path, stages={"encode": 0.0, "denoise": 0.05, "decode": 0.0}), client=client)
    with pytest.raises(DfdaskError, match="run is running; wait for it, or stop it"):
        run.retry_failed()
    run.wait(timeout=60)
    with pytest.raises(DfdaskError, match="only opened here; submit its job with retry_failed=True"):
        open_run(tmp_path / "run").retry_failed()
