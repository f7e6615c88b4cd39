"""The gate places stage tasks by role, two a worker, whoever joins, fails, leaves or takes a rest."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

import dask
import pytest
from distributed import Client, Future, Scheduler, Worker, get_worker
from distributed.core import Status
from tornado.ioloop import IOLoop

from dfdask.cluster import SETTINGS
from dfdask.flow import WINDOW_BATCHES_PER_WORKER
from dfdask.gate import NAME, WRITE, Gate
from dfdask.tags import stage_resource, task_key, worker_resources

STAGES = ("encode", "denoise", "decode")
Test = Callable[..., Coroutine[Any, Any, None]]
CHECKED = {"distributed.scheduler.validate": True, "distributed.worker.validate": True}


def gated(*roles: Iterable[str], gate: bool = True) -> Callable[[Test], Callable[[], None]]:
    """A scheduler with a gate and a worker of one thread for each of ``roles``, all in this process and its loop.

    Not distributed's gen_cluster: that kills all processes below this one, those of other tests too.
    """

    def decorate(test: Test) -> Callable[[], None]:
        loops: list[IOLoop] = []

        async def run() -> None:
            loops.append(IOLoop.current())
            async with Scheduler(
                host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", plugins=[Gate()] if gate else []
            ) as scheduler:
                workers = [
                    await Worker(scheduler.address, nthreads=1, memory_limit=0, resources=worker_resources(stages))
                    for stages in roles
                ]
                try:
                    async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
                        await asyncio.wait_for(test(client, scheduler, *workers), 40)
                finally:
                    await asyncio.gather(*(worker.close(nanny=False) for worker in workers))

        def call() -> None:
            try:
                with dask.config.set(SETTINGS), dask.config.set(CHECKED):
                    asyncio.run(run())
            finally:
                loops[-1].close(all_fds=True)  # tornado's, which keeps sockets of its own

        call.__name__, call.__doc__ = test.__name__, test.__doc__
        return call

    return decorate


def gate_of(scheduler: Scheduler) -> Gate:
    found: Gate = scheduler.plugins[NAME]
    return found


def check_accounts(scheduler: Scheduler) -> None:
    """What the gate believes is what the scheduler knows."""
    gate = gate_of(scheduler)
    dispatcher = gate.dispatcher
    assert set(dispatcher._held) == set(gate.ledger.workers) == set(gate.controller._seats) == set(scheduler.workers)
    for address in scheduler.workers:
        keys = set(dispatcher.held(address))
        processing = {task.key for task in scheduler.workers[address].processing if task.key in gate._placed}
        writing = {key for key in processing if key[0].startswith(f"{WRITE}-")}
        assert keys == processing - writing
        assert len(keys) <= gate.depth
    assert sum(len(level) for levels in dispatcher._free.values() for level in levels) == len(scheduler.workers)
    for key, address in gate._placed.items():
        assert scheduler.tasks[key].state == "processing"
        assert scheduler.tasks[key].processing_on.address == address
    ready = {*dispatcher._queued, *gate._writes}
    assert all(scheduler.tasks[key].state == "no-worker" for key in ready)
    for account in gate.ledger.jobs.values():
        assert all(stage.waiting_items >= 0 and stage.waiting_bytes >= 0 for stage in account.stages.values())
    for key, task in scheduler.tasks.items():
        if any(name.startswith("stage:") for name in task.resource_restrictions or ()):
            assert task.state != "processing", f"{key} got past the gate"
            assert task.state != "no-worker" or key in ready, f"{key} is forgotten"
            assert not task.worker_restrictions, f"{key} is bound to {task.worker_restrictions}"


@asynccontextmanager
async def watched(scheduler: Scheduler) -> AsyncIterator[list[int]]:
    """Check the accounts at every turn of the event loop; gives the most tasks that a worker had at once."""
    most, problems, over = [0], [], False

    async def watch() -> None:
        while not over and not problems:
            try:
                check_accounts(scheduler)
            except AssertionError as error:
                problems.append(error)
            dispatcher = gate_of(scheduler).dispatcher
            most[0] = max([most[0], *(len(dispatcher.held(address)) for address in scheduler.workers)])
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 50)  # for the threads of the workers, which this loop without rest holds up
    try:
        yield most
    finally:
        over = True
        sys.setswitchinterval(interval)
        await watcher
    if problems:
        raise problems[0]


def work(value: Any, seconds: float = 0.0, fail: bool = False) -> list[Any]:
    time.sleep(seconds)
    if fail:
        raise ValueError("as asked")
    return [*(value if isinstance(value, list) else []), get_worker().address]


held_back: defaultdict[str, threading.Event] = defaultdict(threading.Event)
"""The workers are threads of this process, so they may wait for what a test says."""


def hold(value: str) -> list[Any]:
    """Wait until the test lets those that hold ``value`` go on."""
    if not held_back[value].wait(30):
        raise TimeoutError(value)
    return work(None)


began: list[str] = []


def note(value: str) -> None:
    began.append(value)


def put(
    client: Client, stage: str, number: int, value: Any = None, run: str = "run", items: int = 1, **task: Any
) -> Future:
    """Submit one stage task, as the driver's graphs do."""
    return client.submit(
        task.pop("function", work),
        value,
        key=task_key(stage, run, number, 0, items),
        resources=stage_resource(stage),
        priority=(*STAGES, WRITE).index(stage),
        **task,
    )


def chain(client: Client, number: int, seconds: float = 0.0, **task: Any) -> Future:
    return links(client, number, seconds, **task)[-1]


def links(client: Client, number: int, seconds: float = 0.0, **task: Any) -> list[Future]:
    found: list[Future] = []
    for stage in STAGES:
        found.append(put(client, stage, number, found[-1] if found else None, seconds=seconds, **task))
    return found


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.005)


@gated(("encode",), ("denoise",), ("denoise",), ("decode",))
async def test_tasks_run_where_their_role_is(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with watched(scheduler) as most:
        found = await client.gather([chain(client, number, 0.002) for number in range(40)])
    assert most == [2], "two are assigned, so that the next one's input is there in time"
    encode, one, other, decode = (worker.address for worker in workers)
    assert {tuple(route[:1] + route[2:]) for route in found} == {(encode, decode)}
    share = Counter(route[1] for route in found)
    assert set(share) == {one, other} and min(share.values()) > 10


@gated((), ("denoise",))
async def test_a_worker_without_a_role_runs_every_stage(
    client: Client, scheduler: Scheduler, free: Worker, bound: Worker
) -> None:
    async with watched(scheduler):
        found = await client.gather([chain(client, number, 0.002) for number in range(20)])
    assert {route[0] for route in found} == {route[2] for route in found} == {free.address}
    held = [put(client, "denoise", number, "third", function=hold) for number in range(3)]
    await until(lambda: len(gate_of(scheduler)._placed) == 3)
    assert [len(gate_of(scheduler).dispatcher.held(worker.address)) for worker in (free, bound)] in ([1, 2], [2, 1])
    held_back["third"].set()
    await client.gather(held)


@gated(("encode",), ("denoise",))
async def test_a_stage_without_a_worker_waits_and_others_go_on(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    last = [chain(client, number) for number in range(5)]
    done = gate_of(scheduler).progress
    await until(lambda: done("run")["done"].get("denoise") == 5)
    assert done("run")["queued"]["decode"] == 5
    async with Worker(scheduler.address, nthreads=1, resources=worker_resources(["decode"])) as late:
        found = await client.gather(last)
        assert {route[2] for route in found} == {late.address}
        check_accounts(scheduler)


def announce(scheduler: Scheduler, run: str = "run", items: int = 100, by: str = "", **more: Any) -> None:
    """Tell the gate of a job of three stages, as the driver does."""
    stages = [{"name": stage, **more.pop(stage, {})} for stage in STAGES]
    job = {"name": run, "output": run, "model": run, "items": items, "items_left": items, "batch": 1}
    job |= {"run": run, "stages": stages, "committed_items": 0, "failed_items": 0, **more}
    gate_of(scheduler).start_job(job, client=by)


@gated((), ("encode",))
async def test_specialists_come_first(client: Client, scheduler: Scheduler, free: Worker, bound: Worker) -> None:
    announce(scheduler)
    assert await put(client, "encode", 0) == [bound.address]
    held = [put(client, "encode", number, "stop", function=hold) for number in range(1, 4)]
    await until(lambda: len(gate_of(scheduler)._placed) == 3)
    assert [len(gate_of(scheduler).dispatcher.held(worker.address)) for worker in (free, bound)] == [1, 2]
    held_back["stop"].set()
    await client.gather(held)


@gated((), (), ())
async def test_a_task_goes_where_its_input_is(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    for number in range(9):
        value = await client.scatter(b"x" * 100_000, workers=[workers[number % 3].address], hash=False)
        assert await put(client, "denoise", number, value) == [workers[number % 3].address]


@gated(())
async def test_later_stages_come_first(client: Client, scheduler: Scheduler, worker: Worker) -> None:
    held = [put(client, "encode", number, "go", run="other", function=hold) for number in range(2)]
    await until(lambda: len(gate_of(scheduler)._placed) == 2)
    began.clear()
    waiting = [put(client, "encode", number, "encode", function=note) for number in range(4)]
    waiting += [put(client, stage, number, stage, function=note) for stage in STAGES[1:] for number in range(2)]
    await until(lambda: sum(task.state == "no-worker" for task in scheduler.tasks.values()) == 8)
    held_back["go"].set()
    await client.gather([*held, *waiting])
    assert began == ["decode"] * 2 + ["denoise"] * 2 + ["encode"] * 4


@gated((), ())
async def test_writing_goes_to_the_bytes_and_takes_no_place(
    client: Client, scheduler: Scheduler, *workers: Worker
) -> None:
    small = await client.scatter(b"x" * 1000, workers=[workers[0].address], hash=False)
    large = await client.scatter(b"y" * 90_000, workers=[workers[1].address], hash=False)
    async with watched(scheduler) as most:
        held = [put(client, "encode", number, "end", function=hold) for number in range(4)]
        await until(lambda: len(gate_of(scheduler)._placed) == 4)
        writes = [
            client.submit(
                lambda *parts: get_worker().address,
                small,
                large,
                key=task_key(WRITE, "run", number, 0, 1),
                resources=stage_resource(WRITE),
                priority=3,
            )
            for number in range(3)
        ]
        await until(lambda: len(scheduler.workers[workers[1].address].processing) == 5)
        held_back["end"].set()
        assert await client.gather(writes) == [workers[1].address] * 3
        await client.gather(held)
    assert most == [2]


@gated(("encode",), ("denoise",), ("decode",))
async def test_a_worker_that_leaves_takes_no_task_along(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with watched(scheduler):
        last = [chain(client, number, 0.005) for number in range(30)]
        done = gate_of(scheduler).progress
        await until(lambda: done("run")["done"].get("denoise", 0) > 5)
        async with Worker(scheduler.address, nthreads=1, resources=worker_resources(["denoise"])) as heir:
            await workers[1].close(nanny=False)
            found = await client.gather(last)
            assert {route[1] for route in found} >= {heir.address}


@gated((), ())
async def test_a_lost_result_is_computed_again_through_the_gate(
    client: Client, scheduler: Scheduler, one: Worker, other: Worker
) -> None:
    first = put(client, "encode", 0, items=4)
    (address,) = await first
    lost, left = (one, other) if one.address == address else (other, one)
    async with watched(scheduler):
        await lost.close(nanny=False)
        assert await put(client, "denoise", 0, first, items=4) == [left.address, left.address]
    assert gate_of(scheduler).progress("run")["done"] == {"encode": 4, "denoise": 4}, "items are not counted twice"


@gated(("encode",))
async def test_workers_that_join_get_work(client: Client, scheduler: Scheduler, worker: Worker) -> None:
    async with watched(scheduler):
        tasks = [put(client, "encode", number, seconds=0.02) for number in range(40)]
        await until(lambda: len(gate_of(scheduler)._placed) == 2)
        async with (
            Worker(scheduler.address, nthreads=1, resources=worker_resources(["encode"])) as late,
            Worker(scheduler.address, nthreads=1, resources=worker_resources(["decode"])) as wrong,
        ):
            ran = Counter(route[0] for route in await client.gather(tasks))
            assert ran[late.address] > 10 and wrong.address not in ran


@gated(())
async def test_a_paused_worker_gets_nothing_until_it_goes_on(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    worker.status = Status.paused
    await until(lambda: not scheduler.running)
    task, write = put(client, "encode", 0), put(client, WRITE, 0)
    await until(lambda: sum(one.state == "no-worker" for one in scheduler.tasks.values()) == 2)
    await asyncio.sleep(0.05)
    assert not gate_of(scheduler)._placed
    worker.status = Status.running
    assert await asyncio.wait_for(client.gather([task, write]), 10) == [[worker.address]] * 2
    check_accounts(scheduler)


@gated((), ())
async def test_a_worker_that_retires_hands_over(
    client: Client, scheduler: Scheduler, one: Worker, other: Worker
) -> None:
    async with watched(scheduler):
        last = [chain(client, number, 0.003) for number in range(20)]
        await until(lambda: gate_of(scheduler).progress("run")["done"].get("decode", 0) > 2)
        await client.retire_workers([one.address])
        assert len(await client.gather(last)) == 20


@gated((), ())
async def test_errors_and_retries_free_their_places(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    async with watched(scheduler):
        bad = [put(client, "encode", number, fail=True) for number in range(10)]
        after = [put(client, "denoise", number, value) for number, value in enumerate(bad)]
        for future in after:
            with pytest.raises(ValueError, match="as asked"):
                await future
        assert gate_of(scheduler).progress("run")["done"] == {"encode": 0}
        await client.retry(after)
        for future in after:
            with pytest.raises(ValueError, match="as asked"):
                await future
        assert await put(client, "encode", 99)


@gated(())
async def test_what_is_cancelled_leaves_the_queue(client: Client, scheduler: Scheduler, worker: Worker) -> None:
    async with watched(scheduler):
        held = [put(client, "encode", number, "free", run="other", function=hold) for number in range(2)]
        waiting = [put(client, "encode", number) for number in range(10)]
        await until(lambda: gate_of(scheduler).progress("run")["queued"].get("encode") == 10)
        await client.cancel(waiting[:9])
        await until(lambda: len(scheduler.tasks) == 3)
        assert gate_of(scheduler).progress("run")["queued"]["encode"] == 1
        held_back["free"].set()
        assert await waiting[9] == [worker.address]
        await client.gather(held)


@gated(("encode",), ("denoise", "decode"), ())
async def test_progress_says_where_the_items_are(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    await client.gather([put(client, "encode", number, items=3) for number in range(2)])
    held = [put(client, "decode", number, "on", items=5, function=hold) for number in range(7)]
    await until(lambda: Counter(task.state for task in scheduler.tasks.values())["no-worker"] == 3)
    state = await client.scheduler.dfdask_progress(run="run")
    assert state.pop("gate_seconds") > 0
    assert state == {
        "queued": {"encode": 0, "decode": 15},
        "running": {"encode": 0, "decode": 20},
        "done": {"encode": 6, "decode": 0},
        "roles": {"decode": 2},
        "unserved": (),
        "starting": 0,
        "window": 3 * WINDOW_BATCHES_PER_WORKER,
        "workers": 3,
    }
    other = await client.scheduler.dfdask_progress(run="no such run")
    assert not other["running"] and not other["done"] and not other["queued"]
    held_back["on"].set()
    await client.gather(held)


@gated((), ())
async def test_registering_it_again_changes_nothing(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    gate = gate_of(scheduler)
    async with watched(scheduler):
        last = [chain(client, number, 0.003) for number in range(10)]
        for _ in range(3):
            await client.register_plugin(Gate(), name=NAME)
        assert gate_of(scheduler) is gate
        await client.gather(last)
    assert gate.progress("run")["done"] == dict.fromkeys(STAGES, 10)


@gated(*((stage,) for stage in STAGES), gate=False)
async def test_a_gate_that_comes_late_finds_what_waits(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    last = [chain(client, number) for number in range(5)]
    await until(lambda: sum(task.state == "no-worker" for task in scheduler.tasks.values()) == 5)
    await client.register_plugin(Gate(), name=NAME)
    assert await client.gather(last) == [[worker.address for worker in workers]] * 5
    check_accounts(scheduler)


@gated(())
async def test_a_run_goes_on_as_long_as_one_of_its_clients_does(
    client: Client, scheduler: Scheduler, worker: Worker
) -> None:
    gate = gate_of(scheduler)
    for by in ("one", "two", "three"):
        announce(scheduler, by=by)
    gate.end_job("run", client="two")
    gate.remove_client(scheduler, "three")
    assert "run" in gate.ledger.jobs
    gate.end_job("run", client="one")
    assert "run" not in gate.ledger.jobs
    announce(scheduler, by="one")
    gate.end_job("run")
    assert "run" not in gate.ledger.jobs, "for all of them"


@gated(("encode",), ())
async def test_other_peoples_tasks_are_left_alone(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    held = [put(client, "encode", number, "later", function=hold) for number in range(8)]
    await until(lambda: len(gate_of(scheduler)._placed) == 4)
    others = client.map(lambda number: number + 1, range(50))
    held_back["later"].set()
    assert await client.gather(others) == list(range(1, 51))
    await client.gather(held)
    check_accounts(scheduler)


@gated((), ())
async def test_two_runs_with_windows_share_the_workers(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
    ends: list[str] = []

    async def drive(run: str) -> None:
        """Twelve tasks in the scheduler at a time, as the driver does."""
        flying: set[Future] = set()
        for number in range(60):
            flying.add(put(client, "denoise", number, run=run, seconds=0.004))
            while len(flying) >= 12:
                await asyncio.wait(
                    [asyncio.ensure_future(one._result()) for one in flying], return_when="FIRST_COMPLETED"
                )
                done = {one for one in flying if one.done()}
                ends.extend([run] * len(done))
                flying -= done
        await client.gather(list(flying))
        ends.extend([run] * len(flying))

    await asyncio.gather(drive("a"), drive("b"))
    assert Counter(ends) == {"a": 60, "b": 60}
    half = Counter(ends[:60])
    assert min(half.values()) > 5, half


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_the_accounts_are_right_whatever_happens(seed: int) -> None:
    """Joins, deaths, farewells, rests, failures, retries and cancellations at random."""
    chance = random.Random(seed)

    @gated(*((stage,) for stage in STAGES))
    async def trial(client: Client, scheduler: Scheduler, *first: Worker) -> None:
        workers = list(first)
        running: list[Future] = []
        kept: list[Future] = []  # a client can retry only what it holds, the causes too
        number = 0
        async with watched(scheduler):
            for _ in range(30):
                event = chance.choice(["submit"] * 5 + ["join", "leave", "die", "pause", "resume", "cancel", "retry"])
                if event == "submit":
                    for _ in range(chance.randrange(1, 8)):
                        kept += links(client, number, chance.random() / 100, fail=chance.random() < 0.05)
                        running.append(kept[-1])
                        number += 1
                elif event == "join" and len(workers) < 8:
                    roles = chance.sample(STAGES, chance.randrange(3))
                    workers.append(
                        await Worker(scheduler.address, nthreads=1, memory_limit=0, resources=worker_resources(roles))
                    )
                elif event in ("leave", "die") and len(workers) > 1:
                    worker = workers.pop(chance.randrange(len(workers)))
                    if event == "die":  # the scheduler notices first, and takes it for a crash
                        await scheduler.remove_worker(worker.address, stimulus_id="test", expected=False)
                    await worker.close(nanny=False)
                elif event in ("pause", "resume"):
                    chance.choice(workers).status = Status.paused if event == "pause" else Status.running
                elif event == "cancel" and running:
                    await client.cancel([running.pop(chance.randrange(len(running)))])
                elif event == "retry":
                    await client.retry([future for future in running if future.status == "error"])
                await asyncio.sleep(chance.random() / 20)
            for worker in workers:
                worker.status = Status.running
            workers.append(await Worker(scheduler.address, nthreads=1, memory_limit=0))
            await asyncio.wait_for(asyncio.gather(*(future._state.wait() for future in running)), 30)
            states = Counter(future.status for future in running)
            assert set(states) <= {"finished", "error"} and states["finished"] > states["error"]
            await until(lambda: not gate_of(scheduler)._placed)
        running.clear()
        kept.clear()
        await until(lambda: not scheduler.tasks)
        gate = gate_of(scheduler)
        assert not any(gate.dispatcher.held(worker) for worker in scheduler.workers)
        queued = defaultdict(int, gate.progress("run")["queued"])
        assert not any(queued.values())
        for worker in workers:
            with contextlib.suppress(Exception):
                await worker.close(nanny=False)

    trial()
