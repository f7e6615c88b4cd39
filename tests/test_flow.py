"""Backpressure: limits follow what results weigh, and the books of what waits always balance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.controller import ANY_CLASS, TURN_LOADS, Controller, JobFacts, StageFacts
from dfdask.dispatch import Dispatcher, Kind
from dfdask.flow import MOST_WINDOW_BATCHES, STOCK_BATCHES_PER_WORKER, WAITING_PART, WINDOW_BATCHES_PER_WORKER, Flow
from dfdask.ledger import JobAccount, Ledger, WorkerAccount
from dfdask.placement import Device

STAGES = ("encode", "denoise", "decode")
ENCODE, DENOISE = ("job", "encode"), ("job", "denoise")
GB = 1 << 30


class Cluster:
    """A flow with the gate's books; device memory is for one stage of 10 bytes unless ``roomy``."""

    def __init__(self, workers: int = 2, host_bytes: int = GB, roomy: bool = True) -> None:
        self.dispatcher, self.controller, self.ledger = Dispatcher(), Controller(), Ledger()
        self.flow = Flow(self.dispatcher, self.controller, self.ledger)
        for number in range(workers):
            memory = 1 << 40 if roomy else 10
            self.ledger.workers[f"w{number}"] = WorkerAccount(f"w{number}", "cpu", memory, host_bytes, 0.0, 0.0)
            self.controller.add_device(Device(f"w{number}", "cpu", memory))

    def add(
        self,
        run: str = "job",
        items: int = 10_000,
        batch: int = 4,
        stages: tuple[str, ...] = STAGES,
        load_seconds: float = 0.0,
    ) -> None:
        load = {ANY_CLASS: load_seconds}
        facts = tuple(StageFacts(stage, {f"{run}/{stage}": 10}, load_seconds=load) for stage in stages)
        self.controller.add_job(JobFacts(run, "model", facts, items, batch))
        self.announce(run, items)
        self.controller.decide()

    def announce(self, run: str, items: int) -> None:
        self.ledger.jobs[run] = JobAccount(run, "", items, 0, 0, 0.0, set())

    def waiting(self, kind: Kind = ENCODE) -> tuple[int, int]:
        account = self.ledger.jobs[kind[0]].stage(kind[1])
        return account.waiting_items, account.waiting_bytes

    def limit(self, kind: Kind = ENCODE) -> float:
        self.flow.set_limits()
        return self.dispatcher.limit_items(kind)


def test_results_wait_from_when_they_are_made_until_they_are_used() -> None:
    cluster = Cluster()
    cluster.add()
    cluster.flow.made("a", ENCODE, 4, 400)
    cluster.flow.made("b", ENCODE, 2, 100)
    assert cluster.waiting() == (6, 500)
    cluster.flow.used("a")
    assert cluster.waiting() == (2, 100)


def test_a_result_that_is_made_again_waits_once() -> None:
    cluster = Cluster()
    cluster.add()
    for nbytes in (400, 300):
        cluster.flow.made("a", ENCODE, 4, nbytes)
    assert cluster.waiting() == (4, 300)
    for _ in range(2):
        cluster.flow.used("a")
    assert cluster.waiting() == (0, 0)


def test_a_use_makes_room_at_the_dispatcher() -> None:
    cluster = Cluster()
    cluster.add()
    cluster.dispatcher.follow(ENCODE, DENOISE, 4)
    cluster.dispatcher.join("w0", cluster.controller._seats["w0"])
    cluster.dispatcher.push(ENCODE, 0, "a", 4)
    cluster.dispatcher.assign(lambda key: {})
    cluster.dispatcher.done("a", finished=True)
    cluster.flow.made("a", ENCODE, 4, 400)
    assert cluster.dispatcher.allowed_items(ENCODE) == 0
    cluster.flow.used("a")
    assert cluster.dispatcher.allowed_items(ENCODE) == 4


def test_results_of_a_job_that_ended_are_nobodys() -> None:
    cluster = Cluster()
    cluster.add()
    cluster.flow.made("a", ENCODE, 4, 400)
    del cluster.ledger.jobs["job"]
    cluster.flow.used("a")
    cluster.flow.made("b", ENCODE, 4, 400)
    assert not cluster.ledger.jobs


def test_a_job_that_is_announced_again_owes_nothing_for_earlier_results() -> None:
    cluster = Cluster()
    cluster.add()
    cluster.flow.made("a", ENCODE, 4, 400)
    cluster.announce("job", 10_000)
    cluster.flow.used("a")
    assert cluster.waiting() == (0, 0)


STEPS = st.lists(
    st.tuples(st.sampled_from(("made", "used", "announce", "end")), st.integers(0, 5), st.integers(0, 9)), max_size=60
)


@given(STEPS)
def test_what_waits_is_never_negative(steps: list[tuple[str, int, int]]) -> None:
    cluster = Cluster()
    cluster.add()
    for step, key, size in steps:
        if step == "made":
            cluster.flow.made(key, ENCODE, size, 100 * size)
        elif step == "used":
            cluster.flow.used(key)
        elif step == "announce":
            cluster.announce("job", 100)
        else:
            cluster.ledger.jobs.pop("job", None)
        if "job" in cluster.ledger.jobs:
            assert min(cluster.waiting()) >= 0
    for key in range(6):
        cluster.flow.used(key)
    assert "job" not in cluster.ledger.jobs or cluster.waiting() == (0, 0)


def test_a_fleet_with_room_keeps_a_few_batches_in_stock() -> None:
    cluster = Cluster(workers=3)
    cluster.add(batch=4)
    assert not cluster.controller.works_ahead
    assert cluster.limit(ENCODE) == cluster.limit(DENOISE) == STOCK_BATCHES_PER_WORKER * 3 * 4
    assert cluster.limit(("job", "decode")) == math.inf, "nobody waits for what is written"


def test_heavy_results_lower_the_limit() -> None:
    cluster = Cluster(workers=1, host_bytes=GB)
    cluster.add()
    cluster.ledger.jobs["job"].stage("encode").finish(1, 1.0, GB // 10, 1.0)
    assert cluster.limit() == WAITING_PART * GB / 2 // (GB / 10) == 2
    cluster.ledger.jobs["job"].stage("encode").bytes_per_item = 100 * GB
    assert cluster.limit() == 1, "one at a time always may"


def test_a_fleet_that_takes_turns_works_far_ahead() -> None:
    cluster, slower, roomy = Cluster(roomy=False), Cluster(roomy=False), Cluster()
    for one, load_seconds in ((cluster, 30.0), (slower, 60.0), (roomy, 30.0)):
        one.add(load_seconds=load_seconds)
        one.ledger.jobs["job"].stage("encode").bytes_per_item = 1000
    assert cluster.controller.works_ahead
    assert slower.limit() == pytest.approx(2 * cluster.limit()) and cluster.limit() > 10 * roomy.limit()


def test_turns_are_no_longer_than_their_loads_are_worth() -> None:
    quick, alike = Cluster(roomy=False), Cluster()
    quick.add(load_seconds=0.01)
    alike.add()
    assert quick.limit() == alike.limit(), "hours of results in stock are late, and lost with their worker"
    for stage in STAGES:
        for _ in range(30):
            quick.controller.finished(("job", stage), 4, "w0", 4.0)
    quick.controller.add_job(replace(quick.controller.jobs["job"], batch=1))
    loads_seconds, item_seconds, workers = 3 * 0.01, 3 * 1.0, 2
    assert quick.controller.turn_items("job") == pytest.approx(workers * TURN_LOADS * loads_seconds / item_seconds, 0.5)


def test_memory_limits_turns_too() -> None:
    cluster = Cluster(roomy=False)
    cluster.add(load_seconds=1e6)
    cluster.ledger.jobs["job"].stage("encode").bytes_per_item = 1000
    assert cluster.limit() == 2 * WAITING_PART * GB / 2 // 1000


@pytest.mark.parametrize("load_seconds", [0.0, 2.0])
def test_a_fleet_of_one_stage_each_works_ahead_where_a_change_costs_a_load(load_seconds: float) -> None:
    cluster = Cluster(workers=3, roomy=False)
    cluster.add(load_seconds=load_seconds)
    assert cluster.controller.works_ahead == (load_seconds > 0)


def test_jobs_divide_the_room() -> None:
    cluster = Cluster(roomy=False)
    cluster.add("job", load_seconds=1e6)
    alone = cluster.limit()
    cluster.add("other", load_seconds=1e6)
    assert cluster.limit() == pytest.approx(alone / 2, abs=1)


def test_a_worker_without_a_memory_limit_counts_as_an_ordinary_one() -> None:
    unlimited, ordinary = (Cluster(host_bytes=size, roomy=False) for size in (0, 2 * GB))
    for one in (unlimited, ordinary):
        one.add(load_seconds=1e6)
    assert unlimited.limit() == ordinary.limit() > 0


def test_the_window_keeps_every_worker_busy() -> None:
    cluster = Cluster(workers=3)
    cluster.add()
    cluster.flow.set_limits()
    assert cluster.flow.window("job") == 3 * WINDOW_BATCHES_PER_WORKER
    assert Cluster(workers=0).flow.window("nobody's") == WINDOW_BATCHES_PER_WORKER


def test_the_window_of_turns_reaches_as_far_as_results_may_wait() -> None:
    cluster = Cluster(roomy=False)
    cluster.add(items=1200, batch=4, load_seconds=1e6)
    for stage in STAGES:
        cluster.ledger.jobs["job"].stage(stage).bytes_per_item = 1000
    cluster.flow.set_limits()
    assert cluster.flow.window("job") == 300, "all there is"
    facts = cluster.controller.jobs["job"]
    cluster.controller.add_job(replace(facts, items=10**9, batch=1))
    cluster.flow.set_limits()
    assert cluster.flow.window("job") == MOST_WINDOW_BATCHES


@given(
    st.integers(0, 5),
    st.integers(0, 1 << 44),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 64), st.integers(1, 3)), min_size=1, max_size=3),
    st.floats(0, 1e15),
)
@settings(deadline=None, max_examples=50)
def test_every_limit_lets_something_start(
    workers: int, host_bytes: int, roomy: bool, jobs: list[tuple[int, int, int]], weight: float
) -> None:
    cluster = Cluster(workers, host_bytes, roomy)
    for number, (items, batch, stages) in enumerate(jobs):
        cluster.add(f"job{number}", items, batch, STAGES[:stages])
        for stage in STAGES[:stages]:
            cluster.ledger.jobs[f"job{number}"].stage(stage).bytes_per_item = weight
    cluster.flow.set_limits()
    for run, job in cluster.controller.jobs.items():
        assert all(cluster.dispatcher.limit_items((run, stage.name)) >= 1 for stage in job.stages)
        assert WINDOW_BATCHES_PER_WORKER <= cluster.flow.window(run) <= MOST_WINDOW_BATCHES
