"""Writers and creators that are killed, race or run out of disk, as real processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest
from stored import columns, everything, new_run, pixels, put

from dfdask.errors import StorageError
from dfdask.store import Layout, RunStore
from dfdask.targets import Location

ITEMS, SHARD, SHAPE = 200, 32, (48, 48, 3)
FAILED_ROWS = (3, 100)

# Its children start at once with everything imported, and without the threads of this process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "dfdask.store", "zarr.storage", "obstore.store"])


def write_all(location: Location, say: Connection, seed: int = 0) -> None:
    """Do what a worker does, over all shards in an order of its own."""
    store = new_run(location, ITEMS, SHARD, SHAPE)
    say.send("begun")
    for shard in random.Random(seed).sample(range(store.layout.shards), store.layout.shards):
        put(store, shard, FAILED_ROWS)
    say.send("done")


def create(location: Location, say: Connection, place: int) -> None:
    layout = Layout("image", SHAPE, 30_000, SHARD)
    values = columns(30_000)
    say.send("begun")
    store = RunStore.create(location, layout, values, {"dfdask": {"creator": place}})
    say.send(store.attributes["dfdask"]["creator"])


def write_without_room(location: Location, say: Connection, room_bytes: int) -> None:
    """Write shard 0 where no file may grow beyond ``room_bytes``, say what came of it, then with room enough."""
    store = RunStore.open(location)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, unlimited[1]))
    try:
        put(store, 0)
        say.send("no error")
    except StorageError as error:
        say.send(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    put(store, 0)
    say.send("done")


@contextmanager
def child(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that runs ``work(*arguments)``, and what it says; gone in the end."""
    hear, say = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_start, args=(work, dict(os.environ), arguments[0], say, *arguments[1:]))
    process.start()
    say.close()
    try:
        yield process, hear
    finally:
        process.kill()
        process.join(30)
        hear.close()
        process.close()


def _start(work: Callable[..., None], environment: dict[str, str], *arguments: Any) -> None:
    os.environ.update(environment)  # the server that children are forked from keeps that of its own start
    work(*arguments)


def heard(hear: Connection) -> Any:
    assert hear.poll(60), "a child process says nothing"
    return hear.recv()


def seconds_of(work: Callable[..., None], *arguments: Any) -> float:
    """How long ``work`` takes from where it says that it has begun."""
    with child(work, *arguments) as (_, hear):
        assert heard(hear) == "begun"
        began = time.monotonic()
        heard(hear)
        return time.monotonic() - began


def killed(after_seconds: float, work: Callable[..., None], *arguments: Any) -> None:
    with child(work, *arguments) as (process, hear):
        assert heard(hear) == "begun"
        time.sleep(after_seconds)
        process.kill()
        process.join(30)


def arrays_of(location: Location) -> dict[str, bytes]:
    """All objects but the commits, which tell who wrote them."""
    return {key: data for key, data in everything(location).items() if not key.startswith("commits/0")}


def assert_sound(store: RunStore) -> None:
    """Whatever is committed is there and right."""
    assert store.verify() == []
    found = store.dataset()[["image", "status"]].load()
    for record in store.commits():
        rows, wanted = slice(record["start"], record["stop"]), pixels(store, record["shard"])
        for row in FAILED_ROWS:
            if rows.start <= row < rows.stop:
                wanted[row - rows.start] = 0
        assert np.array_equal(store.read_shard(record["shard"], record)["image"], wanted)
        assert np.array_equal(found["image"][rows].values, wanted)
        assert found["status"][rows].values.all()


def moments(number: int, span_seconds: float) -> list[float]:
    """Random moments, spread over the whole span."""
    return [(place + random.random()) / number * span_seconds for place in range(number)]


def kill_writers(location: Location, number: int) -> None:
    whole = replace(location, name=f"{location.name}-whole")
    span = seconds_of(write_all, whole)
    wanted = arrays_of(whole)
    caught = set()
    for place, moment in enumerate(moments(number, span)):
        here = replace(location, name=f"{location.name}-{place}")
        killed(moment, write_all, here, place)
        store = RunStore.open(here)
        caught.add(len(store.committed()))
        assert_sound(store)
        with child(write_all, here, place + 1) as (_, hear):
            assert [heard(hear), heard(hear)] == ["begun", "done"]
        assert store.committed() == set(range(store.layout.shards))
        assert_sound(store)
        store.sweep(older_than_seconds=0)
        assert arrays_of(here) == wanted
        if here.kind == "local":
            files = {str(path.relative_to(here.path)) for path in here.path.rglob("*") if path.is_file()}
            assert files == set(everything(here)), "nothing is left of the killed writer"
    assert len(caught) > 1, f"all {number} were killed with {caught} shards done"


def test_killed_writers(location: Location) -> None:
    kill_writers(location, 8 if location.kind == "local" else 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_writers_killed_at_many_moments(location: Location) -> None:
    kill_writers(location, 150 if location.kind == "local" else 40)


def kill_creators(location: Location, number: int) -> None:
    span = seconds_of(create, replace(location, name=f"{location.name}-whole"), 0)
    for place, moment in enumerate(moments(number, span)):
        here = replace(location, name=f"{location.name}-{place}")
        killed(moment, create, here, 1)
        first = RunStore.exists(here)
        if first:
            assert RunStore.open(here).verify() == []
        with child(create, here, 2) as (_, hear):
            assert [heard(hear), heard(hear)] == ["begun", 1 if first else 2]
        assert RunStore.open(here).verify() == []


def test_killed_creators(location: Location) -> None:
    kill_creators(location, 4 if location.kind == "local" else 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_creators_killed_at_many_moments(location: Location) -> None:
    kill_creators(location, 80 if location.kind == "local" else 30)


def test_creators_race_as_processes(location: Location) -> None:
    with ExitStack() as stack:
        hears = [stack.enter_context(child(create, location, place))[1] for place in range(3)]
        said = [[heard(hear), heard(hear)] for hear in hears]
    assert {first for first, _ in said} == {"begun"}
    winner = RunStore.open(location).attributes["dfdask"]["creator"]
    assert [last for _, last in said] == [winner] * 3
    assert RunStore.open(location).verify() == []


def test_one_of_two_writers_is_killed(location: Location) -> None:
    """Both write the same shards at the same time."""
    with child(write_all, location, 5) as (first, one), child(write_all, location, 5) as (_, two):
        assert heard(one) == heard(two) == "begun"
        time.sleep(random.uniform(0.02, 0.2))
        first.kill()
        assert heard(two) == "done"
    store = RunStore.open(location)
    assert store.committed() == set(range(store.layout.shards))
    assert_sound(store)


def test_a_full_disk(local: Location) -> None:
    store = new_run(local, ITEMS, SHARD, SHAPE)
    before = everything(local)
    with child(write_without_room, local, 50_000) as (_, hear):
        message = heard(hear)
        assert message.startswith(f"cannot write shard 0 of {local}: ")
        assert "File too large (os error 27)" in message and "\n" not in message and "Debug" not in message
        assert store.committed() == set()
        assert everything(local) == before
        assert heard(hear) == "done", "the same process goes on once there is room"
    assert store.verify() == [] and store.committed() == {0}
    files = {str(path.relative_to(local.path)) for path in local.path.rglob("*") if path.is_file()}
    assert files == set(everything(local)), "what did not fit is not left behind"


def test_no_room_for_a_new_run(local: Location) -> None:
    def said(room_bytes: int) -> list[str]:
        with child(create_without_room, local, room_bytes) as (_, hear):
            return [heard(hear)]

    (message,) = said(3_000)
    assert message.startswith(f"cannot create the run {local}: ") and "\n" not in message
    assert not RunStore.exists(local)
    assert new_run(local, ITEMS, SHARD, SHAPE).verify() == []


def create_without_room(location: Location, say: Connection, room_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        new_run(location, ITEMS, SHARD, SHAPE)
        say.send("no error")
    except StorageError as error:
        say.send(str(error))
