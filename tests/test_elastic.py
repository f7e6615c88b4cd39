"""Clusters that grow and shrink with their work: real processes, by class, and nothing lost or done twice."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import dask
import pytest
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster
from distributed.core import Status
from fleet import until
from forecaster import Forecaster

import dfdask
from dfdask import driver, newcomers
from dfdask import elastic as elastic_module
from dfdask.cluster import SETTINGS
from dfdask.elastic import adapt
from dfdask.errors import ClusterError, SpecError
from dfdask.fleets import Fleet, Frontier, WorkerClass
from dfdask.gate import Gate
from dfdask.scaling import decide
from dfdask.words import status_line

SECONDS = {"denoise": {"big": 0.2, "small": 0.4}}


def work(folder: str, number: int, seconds: float) -> int:
    """Leaves a line for each time that it ran; ``inf`` seconds end when somebody makes the file ``go``."""
    file = os.open(f"{folder}/trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{number} {os.getpid()}\n".encode())
    os.close(file)
    while seconds == math.inf and not os.path.exists(f"{folder}/go"):
        time.sleep(0.05)
    time.sleep(seconds if seconds < math.inf else 0)
    return number


def ran(folder: Path) -> Counter[int]:
    return Counter(int(line.split()[0]) for line in (folder / "trace").read_text().splitlines())


def submit(client: Client, folder: Path, count: int, seconds: float = 0.2, first: int = 0) -> list[Any]:
    numbers = range(first, first + count)
    keys = [("denoise-job", number) for number in numbers]
    return [
        client.submit(work, str(folder), n, seconds, key=key, pure=False) for n, key in zip(numbers, keys, strict=True)
    ]


@contextmanager
def spec_cluster(seconds: Any = SECONDS) -> Iterator[SpecCluster]:
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": "127.0.0.1",
            "port": 0,
            "dashboard_address": "127.0.0.1:0",
            "plugins": [Forecaster(seconds)],
        },
    }
    options = {"nthreads": 1, "memory_limit": 0, "silence_logs": "ERROR", "dashboard": False}
    with (
        dask.config.set(SETTINGS),
        SpecCluster(scheduler=scheduler, worker={"cls": Nanny, "options": options}, silence_logs="ERROR") as cluster,
    ):
        yield cluster


def by_class(cluster: Any) -> Counter[str]:
    """Workers of each class, as everybody sees them: by their tags."""
    infos = cluster.scheduler_info["workers"].values()
    return Counter(tag.removeprefix("class:") for info in infos for tag in info["resources"] if "class:" in tag)


def test_workers_come_by_class_for_a_deadline_and_leave_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    kinds = [WorkerClass("big", 1, 0, 3.0, 1.0, 80 * 10**9), WorkerClass("small", 2, 0, 1.0, 1.0)]
    with spec_cluster() as cluster, Client(cluster) as client:
        follower = adapt(cluster, kinds, deadline=12.0, budget=5.0, interval=0.2, patience=0.6)
        futures = submit(client, tmp_path, 60)
        # 60 items are 24 s of one small worker or 12 s of the big one: the deadline needs more than either.
        until(lambda: by_class(cluster)["big"] == 1 and by_class(cluster)["small"] >= 1, 30, "both classes")
        tags = [info["resources"] for info in cluster.scheduler_info["workers"].values()]
        assert {"class:big": 1, "memory": 80 * 10**9} in tags
        assert client.gather(futures) == list(range(60))
        assert ran(tmp_path) == Counter(range(60)), "nothing ran twice"
        assert follower.decisions[0][1].reason in ("deadline", "late")
        del futures
        until(lambda: not cluster.scheduler_info["workers"], 30, "the last worker to leave")
        until(lambda: not cluster.worker_spec and not cluster.workers, 30, "its process to end")
        spent = follower.spent
        assert 0 < spent < 5.0
        # Between jobs there is nobody and nothing is paid; the next one wakes the cluster up again.
        again = submit(client, tmp_path, 4, first=100)
        assert client.gather(again) == list(range(100, 104))
        assert follower.spent > spent


def test_who_is_busy_or_holds_results_is_not_hurt_when_the_fleet_shrinks(tmp_path: Path) -> None:
    """Three workers for many tasks; then one long task is left, and only its worker stays to the end."""
    with spec_cluster({"denoise": {"big": 0.05}}) as cluster, Client(cluster) as client:
        adapt(cluster, [WorkerClass("big", 3, 0, 0.0, 0.0)], interval=0.2, patience=0.4)
        short = submit(client, tmp_path, 100, 0.05)
        until(lambda: by_class(cluster)["big"] == 3, 30, "three workers")
        long = submit(client, tmp_path, 1, math.inf, first=1000)
        until(lambda: by_class(cluster)["big"] == 1, 30, "two of them to leave")
        assert long[0].status == "pending", "the fleet shrank while the task ran"
        (tmp_path / "go").touch()
        assert client.gather(long + short) == [1000, *range(100)], "what those that left had computed is still there"
        assert ran(tmp_path) == Counter([1000, *range(100)])


def test_a_killed_worker_comes_back_and_nothing_is_lost(tmp_path: Path) -> None:
    with spec_cluster({"denoise": {"big": 0.1}}) as cluster, Client(cluster) as client:
        adapt(cluster, [WorkerClass("big", 2, 0, 0.0, 0.5)], deadline=6.0, interval=0.2, patience=5)
        futures = submit(client, tmp_path, 80, 0.1)
        until(lambda: by_class(cluster)["big"] == 2, 30, "two workers")
        address, info = next(iter(cluster.scheduler_info["workers"].items()))
        until(lambda: info["name"] in cluster.workers, 30, "the cluster to know it")
        os.kill(cluster.workers[info["name"]].pid, signal.SIGKILL)
        until(lambda: address not in cluster.scheduler_info["workers"], 30, "the scheduler to notice")
        assert client.gather(futures) == list(range(80))
        assert len(cluster.worker_spec) == 2, "its nanny brings it back: no other one is asked for"


def test_a_worker_of_somebody_else_counts_and_is_never_closed(tmp_path: Path) -> None:
    with spec_cluster({"denoise": {"big": 0.1}}) as cluster, Client(cluster) as client:

        async def join() -> Nanny:
            return await Nanny(
                cluster.scheduler_address, nthreads=1, resources={"class:big": 1}, name="guest", dashboard=False
            )

        guest = cluster.sync(join)
        follower = adapt(cluster, [WorkerClass("big", 4, 0, 0.0, 1.0)], deadline=30.0, interval=0.2, patience=0.2)
        futures = submit(client, tmp_path, 20, 0.05)
        assert client.gather(futures) == list(range(20))
        del futures
        until(lambda: follower.decision is not None and follower.decision.reason == "idle", 20, "it to be idle")
        assert not cluster.worker_spec, "the guest was enough"
        assert by_class(cluster) == {"big": 1}
        cluster.sync(guest.close)


def test_nothing_is_started_on_a_cluster_that_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may close while the next target is found, and what it has to stop is then missing by that target."""
    deciding, closing = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        decided = decide(*arguments)
        deciding.set()
        closing.wait(30)
        return decided

    with spec_cluster() as cluster:
        adapt(cluster, [WorkerClass("big", 1, 1, 0.0)], interval=0.2)
        until(lambda: by_class(cluster)["big"] == 1, 30, "its worker")
        with monkeypatch.context() as patch:
            patch.setattr(elastic_module, "decide", slowly)
            until(deciding.is_set, 30, "a decision")
            cluster.scale(0)
            cluster.sync(cluster._correct_state)
            cluster._adaptive.stop()
            closing.set()
            time.sleep(1)
        assert not cluster.worker_spec


def test_a_lost_machine_that_is_slow_to_end_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_module, "LOST_SECONDS", 0.5)
    ended = threading.Event()

    class Machine(Nanny):
        async def _on_worker_exit(self, exitcode: int) -> None:
            """It is lost: nothing starts its worker again."""

        async def close(self, *arguments: Any, **options: Any) -> Literal["OK"]:
            if self.name == "big-0":
                await asyncio.to_thread(ended.wait, 30)
            return await super().close(*arguments, **options)

    options = {"nthreads": 1, "memory_limit": 0, "silence_logs": "ERROR", "dashboard": False}
    models = {"big": {"cls": Machine, "options": options}}
    with spec_cluster() as cluster:
        follower = adapt(cluster, [WorkerClass("big", 1, 1, 0.0)], interval=0.2, options=models)
        until(lambda: follower._present() and cluster.workers, 30, "its worker")
        ((first, machine),) = cluster.workers.items()
        os.kill(machine.pid, signal.SIGKILL)
        until(lambda: by_class(cluster)["big"] == 1 and first not in cluster.worker_spec, 20, "another one")
        assert machine.status == Status.running
        threading.Timer(1.0, ended.set).start()  # while the cluster closes, which waits for it
    assert machine.status == Status.closed


def test_one_that_ends_before_it_was_seen_is_asked_for_again() -> None:
    with spec_cluster() as cluster:
        follower = adapt(cluster, [WorkerClass("big", 1, 1, 0.0)], interval=0.5)
        until(lambda: cluster.workers, 30, "its worker")
        ((first, nanny),) = cluster.workers.items()
        cluster.sync(nanny.close)
        until(lambda: first not in cluster.worker_spec and follower._present(), 30, "another one")


def test_who_is_being_started_is_not_taken_for_gone(tmp_path: Path) -> None:
    """By the cluster itself, or for an earlier ``adapt``: their processes are known once all of them are there."""
    started = tmp_path / "started"
    (tmp_path / "slow.py").write_text(
        f"import os, time\nopen({str(started)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(2)\n"
    )
    options = {"preload": [str(tmp_path / "slow.py")], "nthreads": 1, "silence_logs": "ERROR", "dashboard": False}
    kinds, slow = [WorkerClass("big", 3, 3, 0.0)], {"big": {"cls": Nanny, "options": options}}
    with spec_cluster() as cluster:
        cluster.new_spec = {"cls": Nanny, "options": options}
        cluster.scale(2)
        for _ in range(2):
            follower = adapt(cluster, kinds, interval=0.2, options=slow)
            until(lambda: len(cluster.worker_spec) == 3, 20, "the third to be asked for")
            time.sleep(0.5)
        until(lambda follower=follower: len(follower._present()) == 3, 40, "all")
        assert {0, 1} < set(cluster.worker_spec) and len(set(started.read_text().split())) == 3


def test_a_local_cluster_follows_too_and_starts_a_worker_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newcomers, "STALE_SECONDS", 3.0)
    with (
        dask.config.set(SETTINGS),
        LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs="ERROR",
            scheduler_kwargs={"plugins": [Forecaster({"denoise": {"cpu": 0.05}})]},
        ) as cluster,
        Client(cluster) as client,
    ):
        adapt(cluster, [WorkerClass("cpu", 2, 0, 0.0, 1.0)], interval=0.2, patience=0.2)

        def there() -> bool:
            client.sync(client.scheduler.dfdask_want_worker)
            return by_class(cluster)["cpu"] == 1

        until(there, 30, "one worker")
        assert client.gather(submit(client, tmp_path, 10, 0.05)) == list(range(10))
        until(lambda: not cluster.scheduler_info["workers"], 30, "nobody to be there")


@pytest.mark.timeout(300)  # its two workers import torch, one after the other
def test_a_job_waits_for_workers_that_start(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of dfdask is on the cluster, and its worker takes longer to start than a job waits where none does."""
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(driver, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(elastic_module, "LOST_SECONDS", 0.5)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(4)\n")
    options = {"preload": [str(tmp_path / "slow.py")], "silence_logs": "ERROR", "nthreads": 1}
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
    with (
        SpecCluster(scheduler={"cls": Scheduler, "options": scheduler}, silence_logs="ERROR") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        adapt(
            cluster,
            [WorkerClass("big", 1, 0, 1.0, 1.0)],
            interval=0.2,
            patience=1.0,
            options={"big": {"cls": Nanny, "options": options}},
        )
        arguments = {"height": 32, "width": 32, "num_inference_steps": 8}
        job = {"model": str(tiny("sd")), "prompts": ["a cat"] * 40, "arguments": arguments, "shard": 2}
        run = dfdask.submit(job, output=str(tmp_path / "run"), client=client)
        assert "no workers yet; 1 starting" in caplog.text
        until(lambda: run.progress.committed_items > 0, 60, "the first shard")
        (nanny,) = cluster.workers.values()
        cluster.loop.add_callback(nanny.close)  # as if its machine were taken back
        news = "no workers for encode, denoise, decode yet, 1 starting"
        until(lambda: news in status_line(run.progress), 30, "the news")
        assert run.wait(120).progress.committed_items == 40


def test_workers_that_cannot_be_started_are_asked_for_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(elastic_module, "RETRY_SECONDS", 1.0)
    broken = {"big": {"cls": Nanny, "options": {"preload": ["no_such_module"], "silence_logs": "CRITICAL"}}}
    with spec_cluster() as cluster:
        follower = adapt(cluster, [WorkerClass("big", 1, 1)], interval=0.2, options=broken)
        told = cluster.scheduler.plugins[Gate.name].newcomers
        until(lambda: told.starting(time.time()) == 1, 40, "it to be expected")
        until(lambda: "could not start 1 workers of class big" in caplog.text, 40, "the failure to be told")
        until(lambda: told.starting(time.time()) == 0, 5, "jobs not to wait for it")
        until(lambda: caplog.text.count("could not start") >= 2, 40, "another try")
        follower.stop()


def test_a_job_brings_up_its_own_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Forecaster({"encode": {"worker": 0.01}, "denoise": {"worker": 0.1}, "write": {"worker": 0.01}})
    start = Gate.start

    async def started(gate: Gate, scheduler: Scheduler) -> None:
        await start(gate, scheduler)
        await tell.start(scheduler)

    monkeypatch.setattr(Gate, "start", started)
    job = {
        "model": {"fake": {"stages": {"encode": 0.01, "denoise": 0.1}}},
        "prompts": [f"prompt {number}" for number in range(60)],
        "batch": 2,
        "shard": 4,
        "output": str(tmp_path / "run"),
    }
    run = dfdask.submit(job, scale={"max": 2, "price": 1.0, "budget": 5.0})
    assert run.wait().progress.committed_items == 60


def test_a_users_own_adapt_stands_and_what_a_job_started_leaves(tmp_path: Path) -> None:
    job = {"model": {"fake": {"stages": {"encode": 0.01, "denoise": 0.05}}}, "prompts": ["a"] * 8, "scale": {"max": 1}}
    options = {"n_workers": 0, "threads_per_worker": 1, "silence_logs": "ERROR"}
    with (
        dask.config.set(SETTINGS),
        LocalCluster(**options, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        own = adapt(cluster, [WorkerClass("big", 1)], interval=0.2)
        with pytest.raises(SpecError, match="follows its work already"):
            dfdask.submit(job, output=str(tmp_path / "one"), client=client)
        assert own.state != "stopped" and cluster._adaptive is own
        own.stop()
        for name in ("two", "three"):
            dfdask.submit(job, output=str(tmp_path / name), client=client).wait(60)
        assert isinstance(cluster._adaptive, elastic_module.Elastic)
        cluster._adaptive.patience = 0.5
        until(lambda: not cluster.worker_spec, 40, "the worker of the jobs to leave")


@pytest.mark.parametrize("where", [{"scheduler": "tcp://127.0.0.1:1"}, {"client": "plain"}])
def test_a_job_cannot_scale_what_its_process_did_not_start(where: dict[str, Any], client: Client) -> None:
    given = {"client": client} if "client" in where else where
    with pytest.raises(SpecError, match="did not start the cluster and cannot grow it"):
        dfdask.submit(model={"fake": {}}, prompts=["a"], scale={"max": 2}, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": []}, "needs classes of different names"),
        ({"deadline": 0}, "deadline must be a number above 0, got 0"),
        ({"budget": 4.0}, "a budget needs prices"),
        ({"options": {"h100": {}}}, "options for h100, but the classes are big"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        adapt(**{"cluster": None, "classes": [WorkerClass("big", 1)], **change})


def test_a_cluster_that_cannot_start_workers_is_named() -> None:
    with pytest.raises(ClusterError, match="cannot start workers on a object"):
        adapt(object(), [WorkerClass("big", 1)])


def test_classes_that_cannot_hold_a_stage_even_streamed_are_not_counted_on() -> None:
    seconds = dict.fromkeys(("large", "small", "tiny", "cpu"), 1.0)
    entry = {"job": "a", "stage": "denoise", "items": 9, "seconds_per_item": seconds, "bytes": (40, 10)}
    memory = {"large": 80, "small": 24, "tiny": 8, "cpu": 24}
    classes = [WorkerClass(name, 4, memory_bytes=size) for name, size in memory.items()]
    frontier = Frontier([elastic_module._work(entry)], classes, Fleet())
    assert [name for name, known in frontier.seconds.items() if known] == ["large", "small"]
