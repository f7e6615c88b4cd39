"""The driver keeps a bounded window in flight, computes what is missing and nothing else, and says what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, SchedulerPlugin

from dfdask import driver
from dfdask.cluster import LocalFleet
from dfdask.driver import missing_shards, token_for
from dfdask.errors import ClusterError, ModelError
from dfdask.flow import WINDOW_BATCHES_PER_WORKER
from dfdask.run import submit
from dfdask.spec import WorkerGroup
from dfdask.targets import Location


class Counting(SchedulerPlugin):
    """Which stage tasks were computed, and how many micro-batches the scheduler knew at once."""

    name = "test-counting"

    def __init__(self) -> None:
        self.computed: Counter[tuple[str, int]] = Counter()
        self.most = 0

    async def start(self, scheduler: Any) -> None:
        self._tasks = scheduler.tasks
        scheduler.handlers["test_counting"] = self.found

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(key, tuple) or len(key) != 4:
            return
        if finish == "memory":
            self.computed[key[0].split("-")[0], key[1]] += 1
        elif finish == "no-worker":
            known = sum(isinstance(other, tuple) and other[0].startswith("encode-") for other in self._tasks)
            self.most = max(self.most, known)

    def found(self) -> Any:
        return dict(self.computed), self.most


@pytest.fixture
def counted(client: Client) -> Iterator[Any]:
    """A call that returns what was computed since the test began, and the most that was in flight."""
    client.register_plugin(Counting())

    def ask() -> Any:
        found: Any = client.sync(client.scheduler.test_counting)
        return found

    yield ask
    client.unregister_scheduler_plugin(Counting.name)


def job(tmp_path: Path, items: int, **more: Any) -> dict[str, Any]:
    prompts = [f"prompt {number}" for number in range(items)]
    return {"model": {"fake": {}}, "prompts": prompts, "output": str(tmp_path / "run"), "batch": 1, **more}


def test_a_long_job_is_never_all_in_flight(client: Client, tmp_path: Path, counted: Any) -> None:
    submit(job(tmp_path, 300, shard=4), client=client).wait(60)
    computed, most = counted()
    assert computed == {
        (stage, shard): 1 if stage == "write" else 4
        for stage in ("encode", "denoise", "decode", "write")
        for shard in range(75)
    }, "each task once"
    # One shard may reach over the edge of the window, and what is released takes a moment to be forgotten.
    assert WINDOW_BATCHES_PER_WORKER * 2 <= most <= WINDOW_BATCHES_PER_WORKER * 2 * 2 + 4


def test_two_shards_are_in_flight_however_large(client: Client, tmp_path: Path, counted: Any) -> None:
    submit(job(tmp_path, 160, shard=40), client=client).wait(60)
    assert 40 < counted()[1] <= 120


def test_what_is_committed_is_not_computed_again(client: Client, tmp_path: Path, counted: Any) -> None:
    fields = job(tmp_path, 40, shard=4)
    submit(fields, client=client).wait(30)
    before = counted()[0]
    lost = [2, 3, 7]
    for shard in lost:
        (commit,) = (tmp_path / "run/commits").glob(f"*{shard}.json")
        commit.unlink()
    submit(fields, client=client).wait(30)
    again = counted()[0]
    more = {key: again[key] - before[key] for key in again if again[key] != before[key]}
    assert more == {
        (stage, shard): 1 if stage == "write" else 4
        for stage in ("encode", "denoise", "decode", "write")
        for shard in lost
    }


def test_a_stage_that_no_worker_runs_is_named(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 1.0)
    stages = {"encode": 0.0, "denoise": 0.0, "upscale": 0.0}
    run = submit(job(tmp_path, 4, model={"fake": {"stages": stages}}), client=client)
    with pytest.raises(ClusterError, match=r"no workers for upscale .*dfdask worker tcp://\S+ --stages upscale"):
        run.wait(30)
    assert run.progress.phase == "failed" and run.progress.unserved == ("upscale",), "it had been said before"


def test_a_cluster_without_workers_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(driver, "SILENCE_SECONDS", 0.1)
    fleet = LocalFleet([WorkerGroup(count=1)])
    try:
        with Client(fleet.address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=30)
            client.retire_workers(list(client.scheduler_info()["workers"]), close_workers=True)
            with pytest.raises(ClusterError, match="no workers in .* start one with: dfdask worker tcp://"):
                submit(job(tmp_path, 4, model=str(tiny("sd"))), client=client)
            assert "no workers yet; start one with: dfdask worker tcp://" in caplog.text
    finally:
        fleet.close()
    assert not (tmp_path / "run").exists()


def test_a_scheduler_that_goes_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LOST_SECONDS", 1.0)
    fleet = LocalFleet([WorkerGroup(count=1)])
    committed: list[int] = []
    fields = job(tmp_path, 200, shard=2, model={"fake": {"stages": {"generate": 0.02}}})
    with Client(fleet.address, set_as_default=False) as client:
        run = submit(fields, client=client, on_commit=lambda event: committed.append(event.shard) or None)
        try:
            while not committed:
                run.wait(0.05)
        except TimeoutError:
            pass
        fleet.close()
        with pytest.raises(ClusterError, match=r"the scheduler went away; start it again.*shards are committed"):
            run.wait(60)
    assert run.progress.phase == "failed"


class KilledWorker(Exception):
    """Named as Dask names its own."""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ModelError("model: no"), ModelError, "^model: no$"),
        (KilledWorker("denoise"), ClusterError, "kept killing its worker processes"),
        (ValueError("a\n b"), ClusterError, "a worker failed: ValueError: a b"),
        (None, ClusterError, "a worker failed"),
    ],
)
def test_what_a_task_died_of_is_explained(error: BaseException | None, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        raise driver._explained(error)


def test_tokens_name_a_run_in_a_place() -> None:
    b, c = Location("local", "/runs", "b"), Location("local", "/runs", "c")
    near, far = (Location("s3", "bucket/runs", "b", endpoint=f"http://{host}:9000") for host in ("near", "far"))
    assert token_for("a", b) == token_for("a", Location("local", "/runs", "b"))
    assert len({token_for("a", b), token_for("a", c), token_for("c", b)}) == 3
    assert token_for("a", near) != token_for("a", far), "buckets of the same name on two servers"


def test_missing_shards_are_in_order() -> None:
    assert missing_shards(5, {3, 0}) == (1, 2, 4)
    assert missing_shards(3, [0, 1, 2, 9]) == ()
