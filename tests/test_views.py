"""What the gate tells is what its books say: of one run, of all, of what is left."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from dfdask import views
from dfdask.controller import Controller, JobFacts, StageFacts
from dfdask.cost import ItemWork, TaskWork
from dfdask.dispatch import Dispatcher, Seat
from dfdask.events import ClusterState
from dfdask.ledger import JobAccount, Ledger, WorkerAccount
from dfdask.placement import Device
from dfdask.tags import task_key

STAGES = ("encode", "denoise")


class Books:
    """Two runs on three workers: of class ``quick`` (two of them) and ``slow``."""

    def __init__(self) -> None:
        self.ledger, self.dispatcher, self.controller = Ledger(), Dispatcher(depth=2), Controller()
        for name, device_class in (("a", "quick"), ("b", "quick"), ("c", "slow")):
            self.ledger.workers[name] = WorkerAccount(f"worker {name}", device_class, 1 << 34, 0, 0.0, 0.0)
            self.controller.add_device(Device(name, device_class, 1 << 34))
            self.dispatcher.join(name, Seat())
        for run, weight in (("r1", 1.0), ("r2", 3.0)):
            self.controller.add_job(JobFacts(run, "model", tuple(map(StageFacts, STAGES)), 40, 4, weight))
            account = self.ledger.jobs[run] = JobAccount(f"job {run}", f"out/{run}", 40, 8, 1, 5.0, set())
            for stage in STAGES:
                account.stage(stage)
        self.ledger.workers["a"].shares = {("r1", "encode"): 0.25, ("r2", "encode"): 0.5, ("r1", "denoise"): 0.25}
        self.ledger.workers["b"].shares = {("r1", "denoise"): 1.0, ("r2", "denoise"): 0.0}

    def push(self, run: str, stage: str, number: int, items: int = 4) -> tuple[str, int, int, int]:
        key = task_key(stage, run, number, 0, items)
        self.dispatcher.push((run, stage), number, key, items)
        return key

    def assign(self) -> None:
        self.dispatcher.assign(lambda key: {})

    def progress(self, run: str) -> dict[str, Any]:
        return views.progress(run, self.ledger, self.dispatcher, self.controller)

    def state(self, now: float = 10.0) -> ClusterState:
        return views.cluster_state(now, self.ledger, self.dispatcher, self.controller, {"r1": 77.0}, 0.5)

    def forecast(self, *classes: str) -> dict[str, Any]:
        return views.forecast(0.0, self.ledger, self.dispatcher, self.controller, classes)


@pytest.fixture
def books() -> Books:
    return Books()


def test_workers_are_counted_by_what_they_have_a_share_of(books: Books) -> None:
    assert views.roles_by_stage(books.ledger, "r1") == {"encode": 1, "denoise": 2}
    assert views.roles_by_stage(books.ledger, "r2") == {"encode": 1}, "a share of 0 is help, not a role"
    assert views.roles_by_stage(books.ledger) == {"encode": 1, "denoise": 2}


def test_progress_is_of_one_run(books: Books) -> None:
    for number in range(3):
        books.push("r1", "encode", number)
    books.push("r2", "denoise", 0)
    books.ledger.jobs["r1"].stage("encode").done_items = 12
    found = books.progress("r1")
    assert found["queued"] == {"encode": 12, "denoise": 0}
    assert found["done"] == {"encode": 12, "denoise": 0} and found["workers"] == 3
    books.assign()
    assert books.progress("r1")["running"] == {"encode": 12, "denoise": 0}
    assert books.progress("r1")["queued"] == {"encode": 0, "denoise": 0}
    assert books.progress("r2")["running"] == {"encode": 0, "denoise": 4}


def test_of_an_unknown_run_there_is_nothing_but_workers(books: Books) -> None:
    assert books.progress("r9") == {"queued": {}, "running": {}, "done": {}, "roles": {}, "workers": 3}


def test_a_job_is_shown_as_it_was_announced(books: Books) -> None:
    one, two = books.state().jobs
    assert (one.run, one.name, one.output, one.items, one.committed_items, one.failed_items, one.started) == (
        *("r1", "job r1", "out/r1", 40, 8, 1, 5.0),
    )
    assert (one.priority, two.priority) == (1.0, 3.0)
    assert (one.forecast_seconds, two.forecast_seconds) == (77.0, None)


def test_a_stage_shows_what_waits_and_what_it_takes(books: Books) -> None:
    account = books.ledger.jobs["r1"].stage("encode")
    account.finish(4, 8.0, 400, 6.0)
    account.done_items, account.waiting_items, account.waiting_bytes = 4, 4, 400
    for _ in range(40):
        books.controller.costs.observe("model", "encode", "quick", TaskWork(4), 8.0)
    stage = books.state().jobs[0].stages[0]
    assert (stage.name, stage.done, stage.waiting, stage.waiting_bytes, stage.workers) == ("encode", 4, 4, 400, 1)
    assert (stage.device_seconds, stage.measured_seconds, stage.error) == (8.0, 2.0, 0.25)
    assert stage.predicted_seconds == pytest.approx(2.0, rel=0.05), "on the commonest class"


def test_without_workers_nothing_is_predicted(books: Books) -> None:
    books.ledger.workers.clear()
    assert [stage.predicted_seconds for job in books.state().jobs for stage in job.stages] == [None] * 4


def test_a_stage_that_was_not_announced_is_shown_without_a_prediction(books: Books) -> None:
    books.ledger.jobs["r1"].stage("extra").done_items = 3
    books.ledger.jobs["r3"] = JobAccount("r3", "", 0, 0, 0, 0.0, set())
    books.ledger.jobs["r3"].stage("encode")
    state = books.state()
    extra = state.jobs[0].stages[2]
    assert (extra.name, extra.done, extra.predicted_seconds) == ("extra", 3, None)
    assert state.jobs[2].priority == 1.0 and state.jobs[2].stages[0].predicted_seconds is None


def test_a_worker_shows_its_roles_over_all_jobs_and_what_it_runs(books: Books) -> None:
    books.push("r1", "denoise", 0)
    books.assign()
    busy, *idle = books.state().workers
    assert busy.roles == {"encode": 0.75, "denoise": 0.25}
    assert (busy.address, busy.name, busy.device_class, busy.running, busy.held_tasks) == (
        *("a", "worker a", "quick", "denoise", 1),
    )
    assert [(worker.running, worker.held_tasks) for worker in idle] == [(None, 0)] * 2


def test_idle_time_counts_up_to_the_moment_of_the_snapshot(books: Books) -> None:
    books.ledger.workers["a"].set_busy(4.0)
    first = books.state(10.0)
    assert [worker.starving_seconds for worker in first.workers] == [4.0, 10.0, 10.0]
    assert [worker.starving_seconds for worker in books.state(12.0).workers] == [4.0, 12.0, 12.0]
    assert first.when == 10.0 and first.gate_seconds == 0.5


def test_a_snapshot_is_json(books: Books) -> None:
    books.push("r1", "encode", 0)
    books.assign()
    assert json.loads(json.dumps(asdict(books.state()), allow_nan=False))["jobs"][0]["run"] == "r1"


def test_the_forecast_lists_the_work_by_class(books: Books) -> None:
    for device_class, seconds in (("quick", 4.0), ("slow", 12.0)):
        books.controller.costs.observe("model", "denoise", device_class, TaskWork(4), seconds)
    books.controller.finished(("r1", "denoise"), 12, "nobody", 1.0)
    found = books.forecast()
    (work,) = [work for work in found["works"] if (work["job"], work["stage"]) == ("r1", "denoise")]
    assert work["items"] == 28 and work["weight"] == 1.0 and work["bytes"] == (0, 0)
    believed = books.controller.seconds_per_item
    assert work["seconds_per_item"] == {name: believed(("r1", "denoise"), name) for name in ("quick", "slow")}
    assert 0.9 < work["seconds_per_item"]["quick"] < 1.1 < work["seconds_per_item"]["slow"]
    assert found["jobs"] == 2 and len(found["works"]) == 4


def test_the_forecast_names_classes_that_are_not_there_where_something_is_known_of_them(books: Books) -> None:
    def known() -> dict[str, set[str]]:
        return {work["stage"]: set(work["seconds_per_item"]) for work in books.forecast("H100", "odd")["works"]}

    assert known() == dict.fromkeys(STAGES, {"quick", "slow"})
    books.controller.costs.observe("model", "denoise", "odd", TaskWork(4), 8.0)
    books.controller.count_work("r1", {"encode": ItemWork(1e12, 0.0, 0.0, 1e9, 1)})
    assert known() == {"encode": {"quick", "slow", "H100"}, "denoise": {"quick", "slow", "odd"}}
    (work,) = [work for work in books.forecast("odd")["works"] if (work["job"], work["stage"]) == ("r1", "denoise")]
    assert work["seconds_per_item"]["odd"] == pytest.approx(2.0, rel=0.1)


def test_a_class_that_may_not_run_a_stage_has_no_seconds_for_it(books: Books) -> None:
    books.controller.remove_device("c")
    books.controller.add_device(Device("c", "slow", 1 << 34), frozenset({"encode"}))
    found = {work["stage"]: set(work["seconds_per_item"]) for work in books.forecast()["works"]}
    assert found == {"encode": {"quick", "slow for encode"}, "denoise": {"quick"}}


def test_the_forecast_says_who_is_idle(books: Books) -> None:
    books.push("r1", "encode", 0)
    books.assign()
    found = books.forecast()["workers"]
    assert {name: (worker["idle"], worker["held_tasks"], worker["class"]) for name, worker in found.items()} == {
        "a": (False, 1, "quick"),
        "b": (True, 0, "quick"),
        "c": (True, 0, "slow"),
    }
