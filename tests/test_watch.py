"""A run as others see it: from its store alone, and with what a scheduler says of it."""

from __future__ import annotations

import itertools
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from samples import PROGRESS
from stored import new_run, pixels

from dfdask.cli import main
from dfdask.errors import ClusterError
from dfdask.notebook import Fleet
from dfdask.run import submit
from dfdask.store import FAILED, OK, RunStore
from dfdask.store_events import EventLog
from dfdask.store_objects import Objects
from dfdask.targets import Location
from dfdask.watch import StoreWatch, cluster_state, joined, states


def commit(store: RunStore, shard: int, written: float, failed: int = 0) -> None:
    rows = len(store.layout.rows(shard))
    status = pixels(store, shard)[:, 0, 0, 0] * 0 + OK
    status[:failed] = FAILED
    store.write_shard(shard, pixels(store, shard), status, [""] * rows, {"written": written})


def test_progress_by_the_commits_alone(local: Location) -> None:
    store, now = new_run(local, items=20, shard_items=2), 1000.0
    watched = StoreWatch(store)
    progress, remark = watched.progress(now)
    assert (progress.phase, progress.committed_items, progress.items_per_second) == ("running", 0, None)
    assert remark == "nothing is committed yet"
    for shard in range(5):
        commit(store, shard, now + 1 + shard, failed=shard % 2)
    assert watched.progress(now + 1)[0].committed_items == 0, "the store is not asked every second"
    progress, remark = watched.progress(now + 9)
    assert (progress.committed_items, progress.failed_items, progress.committed_shards) == (10, 2, 5)
    assert progress.items_per_second == pytest.approx(8 / 8) and progress.eta_seconds == pytest.approx(10)
    assert (progress.elapsed_seconds, remark) == (8.0, "last commit 4.0 s ago")
    progress, remark = watched.progress(now + 900)
    assert progress.items_per_second is None and "last commit 14 min" in remark
    for shard in range(5, 10):
        commit(store, shard, now + 901)
    progress, _ = watched.progress(now + 910)
    assert (progress.phase, progress.committed_items, progress.elapsed_seconds) == ("finished", 20, 900.0)


def test_a_silence_has_no_speed_and_is_told(local: Location) -> None:
    """The client was killed, which says no goodbye."""
    store, now = new_run(local, items=20, shard_items=2), 1000.0
    for shard in range(5):
        commit(store, shard, now + 2 * shard)
    progress, remark = StoreWatch(store).progress(now + 60)
    assert progress.items_per_second and remark == "last commit 52 s ago"
    progress, remark = StoreWatch(store).progress(now + 70)
    assert (progress.phase, progress.items_per_second, progress.eta_seconds) == ("running", None, None)
    assert remark == "last commit 1 min 02 s ago; its client may be gone: the same command goes on"
    state = {"jobs": [], "workers": [{}]}
    assert joined(progress, remark, state, "t")[1].startswith("last commit 1 min 02 s ago, not on this scheduler; its")


def test_only_new_commits_are_read(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = new_run(local, items=20, shard_items=2), []
    original = RunStore.commit
    watched = StoreWatch(store)
    commit(store, 0, 1.0)
    watched.progress(10.0)
    commit(store, 1, 2.0)
    monkeypatch.setattr(RunStore, "commit", lambda self, shard: read.append(shard) or original(self, shard))
    watched.progress(20.0)
    watched.progress(30.0)
    assert read == [1]


def test_a_complete_run_is_not_watched(local: Location) -> None:
    store = new_run(local)
    for shard in range(3):
        commit(store, shard, 1.0)
    assert [progress.phase for progress, _ in states(store, None)] == ["finished"]


def test_a_run_that_was_stopped_is_watched_until_it_would_have_gone_on(
    local: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfdask.watch.STORE_SECONDS", 0.0)
    monkeypatch.setattr("dfdask.watch.POLL_SECONDS", 0.05)
    store, times = new_run(local), itertools.count(1.0)

    def tell(client: EventLog, kind: str, **fields: Any) -> None:
        client.append([{"event": kind, "when": next(times), "run": "r", **fields}])

    first = EventLog(Objects(store.location))
    tell(first, "JobStarted")
    commit(store, 0, 1.0)
    watched = states(store, None)
    assert next(watched)[0].phase == next(watched)[0].phase == "running"
    tell(first, "JobEnded", reason="stopped")
    progress, remark = next(watched)
    assert (progress.phase, remark.endswith("ago; the same command goes on")) == ("stopped", True)
    again = EventLog(Objects(store.location))
    tell(again, "JobStarted")
    assert next(watched)[0].phase == "running"
    tell(again, "JobEnded", reason="failed")
    assert next(watched)[0].phase == "failed"
    tell(first, "JobStarted")
    assert next(watched)[0].phase == "running", "a notebook that has submitted it a second time"
    tell(first, "JobEnded", reason="failed")
    assert next(watched)[0].phase == "failed"
    monkeypatch.setattr("dfdask.watch.AGAIN_SECONDS", 0.0)
    assert not list(watched)
    result = CliRunner().invoke(main, ["status", str(store.location.path), "--watch", "--plain"])
    assert result.exit_code == 1 and "failed: 3 of" in result.output, result.output


STATE: dict[str, Any] = {
    "when": 500.0,
    "gate_seconds": 0.1,
    "workers": [{}, {}, {}],
    "jobs": [
        {"run": "other", "stages": []},
        {
            "run": "mine",
            "started": 400.0,
            "forecast_seconds": 77.0,
            "stages": [{"name": "encode", "queued": 1, "running": 2, "waiting": 3, "done": 4, "workers": 1}],
        },
    ],
}


def test_stages_and_forecast_come_from_the_scheduler() -> None:
    progress, remark = joined(PROGRESS, "last commit 4.0 s ago", STATE, "mine")
    assert [(stage.name, stage.done) for stage in progress.stages] == [("encode", 4)]
    assert (progress.workers, progress.eta_seconds, progress.elapsed_seconds, remark) == (3, 77.0, 100.0, "")
    progress, remark = joined(replace(PROGRESS, stages=()), "last commit 4.0 s ago", STATE, "unknown")
    assert (progress.stages, progress.workers) == ((), 3)
    assert remark == "last commit 4.0 s ago, not on this scheduler"


def test_a_scheduler_that_is_not_there(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfdask.cluster.CONNECT_SECONDS", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ClusterError, match="nothing answers"):
            cluster_state(address)
        with pytest.raises(ClusterError, match="nothing answers"):
            next(states(new_run(local), address))


def test_a_real_scheduler(client: Any, tmp_path: Path) -> None:
    address, fields = client.scheduler.address, {"output": str(tmp_path / "run"), "client": client, "batch": 2}
    prompts = [f"prompt {number}" for number in range(40)]
    run = submit(model={"fake": {"stages": {"encode": 0.0, "denoise": 0.05}}}, prompts=prompts, **fields)
    watched = states(run.store, address)
    seen = []
    for progress, remark in watched:
        seen.append(progress)
        assert remark == "" or progress.phase == "finished" or not progress.stages
    run.wait(timeout=60)
    assert seen[-1].phase == "finished" and seen[-1].committed_items == 40
    staged = [progress for progress in seen if progress.stages]
    assert staged and [stage.name for stage in staged[0].stages] == ["encode", "denoise"]
    assert staged[0].workers == 2
    state = cluster_state(address)
    outputs = [job["output"] for job in state["jobs"]]  # none for tasks that an earlier test left
    assert len(state["workers"]) == 2 and str(run.store.location) not in outputs
    assert "2 workers" in repr(Fleet(client)) and "2 workers" in Fleet(address)._repr_html_()


def test_the_command(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_run(local)
    for shard in range(2):
        commit(store, shard, 1.0)
    monkeypatch.setattr("dfdask.watch.time.sleep", lambda seconds: commit(store, 2, 2.0))
    clock = itertools.count(1000.0, 10.0)
    monkeypatch.setattr("dfdask.watch.time.time", lambda: next(clock))
    result = CliRunner().invoke(main, ["status", str(local.path), "--watch", "--json"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [(line["event"], line["phase"], line["committed_items"]) for line in lines] == [
        ("Progress", "running", 6),
        ("Progress", "finished", 7),
    ]
    result = CliRunner().invoke(main, ["status", str(local.path), "--watch"])
    assert "finished: 7 of 7 items (100%)" in result.output and "3 of 3 committed" in result.output


@pytest.mark.parametrize("options", [["--plain"], ["--scheduler", "tcp://x"], ["--watch", "--plain", "--json"]])
def test_options_that_do_not_go_together(local: Location, options: list[str]) -> None:
    new_run(local)
    assert CliRunner().invoke(main, ["status", str(local.path), *options]).exit_code == 2
