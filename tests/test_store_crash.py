"""Writers and creators that are killed, race or run out of disk, as real processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import columns, everything, new_run, pixels, put

from dfdask.errors import StorageError
from dfdask.export import export_run
from dfdask.store import Layout, RunStore
from dfdask.targets import Location, resolve_output

ITEMS, SHARD, SHAPE = 200, 32, (48, 48, 3)
FAILED_ROWS = (3, 100)

# Its children start at once with everything imported, and without the threads of this process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["pytest", "dfdask.export", "dfdask.store", "PIL.Image", "zarr.storage", "obstore.store"]
)


def write_all(location: Location, say: Connection, seed: int = 0, salt: int = 0) -> None:
    """Do what a worker does, over all shards in an order of its own."""
    store = new_run(location, ITEMS, SHARD, SHAPE)
    say.send("begun")
    for shard in random.Random(seed).sample(range(store.layout.shards), store.layout.shards):
        put(store, shard, FAILED_ROWS, salt)
        say.send(shard)
    say.send("done")


def create(location: Location, say: Connection, place: int) -> None:
    layout = Layout("image", SHAPE, 30_000, SHARD)
    values = columns(30_000)
    say.send("begun")
    try:
        store = RunStore.create(location, layout, values, {"dfdask": {"creator": place}})
        say.send(store.attributes["dfdask"].get("creator"))
    except StorageError as error:
        say.send(str(error))


def export(location: Location, say: Connection, form: Any, destination: Path) -> None:
    store = RunStore.open(location)
    say.send("begun")
    say.send(export_run(store, form, destination, overwrite=True).items)


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


def finished(hear: Connection) -> bool:
    """Whether a child gets to its end."""
    while (said := heard(hear)) != "done":
        assert isinstance(said, int), said
    return True


def seconds_of(work: Callable[..., None], *arguments: Any) -> float:
    """How long ``work`` takes from where it says that it has begun."""
    with child(work, *arguments) as (_, hear):
        assert heard(hear) == "begun"
        began = time.monotonic()
        assert finished(hear) if work is write_all else heard(hear) is not None
        return time.monotonic() - began


def killed(after_seconds: float, work: Callable[..., None], *arguments: Any, shards: int = 0) -> None:
    """Kill the child some time after it has begun, or after it has written so many ``shards``."""
    with child(work, *arguments) as (process, hear):
        assert heard(hear) == "begun"
        for _ in range(shards):
            heard(hear)
        time.sleep(after_seconds)
        process.kill()
        process.join(30)


def arrays_of(location: Location) -> dict[str, bytes]:
    """All objects but the commits, which tell who wrote them."""
    return {key: data for key, data in everything(location).items() if not key.startswith("commits/0")}


def assert_sound(store: RunStore) -> None:
    """Whatever is committed is there and right."""
    assert store.verify() == []
    for record in store.commits():
        rows, wanted = slice(record["start"], record["stop"]), pixels(store, record["shard"])
        for row in FAILED_ROWS:
            if rows.start <= row < rows.stop:
                wanted[row - rows.start] = 0
        found = store.read_shard(record["shard"], record)
        assert np.array_equal(found["image"], wanted) and found["status"].all()


def moments(number: int, span_seconds: float) -> list[float]:
    """Random moments, spread over the whole span."""
    return [(place + random.random()) / number * span_seconds for place in range(number)]


def kill_writers(location: Location, number: int) -> None:
    whole = replace(location, name=f"{location.name}-whole")
    span = seconds_of(write_all, whole)
    wanted, shards = arrays_of(whole), RunStore.open(whole).layout.shards
    for place in range(number):
        here, done = replace(location, name=f"{location.name}-{place}"), (place + 1) * shards // (number + 2)
        killed(random.random() * 2 * span / shards, write_all, here, place, shards=done)
        store = RunStore.open(here)
        assert len(store.committed()) >= done
        assert_sound(store)
        with child(write_all, here, place + 1) as (_, hear):
            assert heard(hear) == "begun" and finished(hear)
        assert store.committed() == set(range(store.layout.shards))
        assert_sound(store)
        store.sweep(older_than_seconds=0)
        assert arrays_of(here) == wanted
        if here.kind == "local":
            files = {str(path.relative_to(here.path)) for path in here.path.rglob("*") if path.is_file()}
            assert files == set(everything(here)), "nothing is left of the killed writer"


def test_killed_writers(location: Location) -> None:
    kill_writers(location, 3 if location.kind == "local" else 1)


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
    kill_creators(location, 3 if location.kind == "local" else 1)


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


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["png", "webdataset", "parquet"])
def test_killed_exports(local: Location, tmp_path: Path, form: Any) -> None:
    """What has the destination's name is whole: the export of before, or a new one."""
    store, out, whole = new_run(local, ITEMS, SHARD, SHAPE), tmp_path / "out", tmp_path / "whole"
    put(store, 0)
    export_run(store, form, out)
    before = files(out)
    for shard in range(1, store.layout.shards):
        put(store, shard, FAILED_ROWS)
    span = seconds_of(export, local, form, whole)
    wanted = files(whole)
    for moment in moments(2, span):
        killed(moment, export, local, form, out)
        assert files(out) in (before, wanted)
    assert export_run(store, form, out, overwrite=True).failed == 1
    assert files(out) == wanted


def test_one_of_two_writers_is_killed(location: Location) -> None:
    """Both write the same shards at the same time."""
    with child(write_all, location, 5) as (first, one), child(write_all, location, 5) as (_, two):
        assert heard(one) == heard(two) == "begun"
        time.sleep(random.uniform(0.02, 0.2))
        first.kill()
        assert finished(two)
    store = RunStore.open(location)
    assert store.committed() == set(range(store.layout.shards))
    assert_sound(store)


@contextmanager
def stopped(after_seconds: float, process: BaseProcess, hear: Connection) -> Iterator[None]:
    """Hold ``process`` still for the block, as a laptop that sleeps or a machine that swaps does."""
    assert heard(hear) == "begun"
    time.sleep(after_seconds)
    with suppress(ProcessLookupError):  # it was done already
        os.kill(process.pid or 0, signal.SIGSTOP)
    yield
    with suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGCONT)


def test_a_late_writer(location: Location) -> None:
    """It wakes up when others have committed all shards long ago, with other pixels."""
    span = seconds_of(write_all, replace(location, name=f"{location.name}-whole"))
    for place, moment in enumerate(moments(2 if location.kind == "local" else 1, span)):
        here = replace(location, name=f"{location.name}-{place}")
        store = new_run(here, ITEMS, SHARD, SHAPE)
        with child(write_all, here, place, 1) as (process, hear):
            with stopped(moment, process, hear):
                for shard in range(store.layout.shards):
                    put(store, shard)
                assert store.verify() == []
            assert finished(hear)
        assert store.verify() == [] and store.committed() == set(range(store.layout.shards))
        image = store.dataset()["image"].values
        for shard in range(store.layout.shards):
            rows = store.layout.rows(shard)
            late = pixels(store, shard, salt=1)
            late[[row - rows.start for row in FAILED_ROWS if row in rows]] = 0
            kept = image[rows.start : rows.stop]
            assert np.array_equal(kept, late) or np.array_equal(kept, pixels(store, shard)), "unmixed"


def test_a_late_creator(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes up when others took it for dead and made a run of other items."""
    span = seconds_of(create, replace(location, name=f"{location.name}-whole"), 0)
    for place, moment in enumerate(moments(4 if location.kind == "local" else 1, span)):
        here = replace(location, name=f"{location.name}-{place}")
        with child(create, here, 1) as (process, hear):
            with stopped(moment, process, hear):
                with monkeypatch.context() as patch:
                    patch.setattr("dfdask.store_create.CLAIM_SECONDS", 0.0)
                    store = new_run(here)
                assert store.verify() == []
            said = heard(hear)
        first = store.attributes["dfdask"].get("creator")
        assert said == first or "another process took over creating" in said
        assert RunStore.open(here) == store and store.verify() == []
        assert not any(key.startswith("creating") for key in everything(here))


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


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        work()
    return str(caught.value)


def on_a_small_disk(folder: str) -> None:
    """What comes of a run in ``folder``, a disk of 500 KiB, that is full, then has room, then is read-only."""
    here, filler = resolve_output(f"{folder}/demo"), Path(folder, "filler")
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    full = "No space left on device (os error 28)"
    assert full in refusal(here.check_writable)
    message = refusal(lambda: new_run(here, 60, SHARD, SHAPE))
    assert message.startswith(f"cannot create the run {here}: ") and "\n" not in message
    assert full in message and "free some space and run the same command again" in message
    assert not RunStore.exists(here)

    filler.write_bytes(bytes(350_000))
    store = new_run(here, 60, SHARD, SHAPE)
    before = everything(here)
    message = refusal(lambda: put(store, 0))
    assert message.startswith(f"cannot write shard 0 of {here}: ") and "\n" not in message
    assert full in message and "free some space and run the same command again" in message
    files = {str(path.relative_to(here.path)) for path in here.path.rglob("*") if path.is_file()}
    assert everything(here) == before and files == set(before)
    filler.unlink()
    assert not put(store, 0).stale and store.verify() == []

    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for work in (here.check_writable, lambda: put(store, 1), lambda: new_run(replace(here, name="other"))):
        assert "Read-only file system" in refusal(work)
    assert RunStore.open(here).verify() == [] and store.dataset()["status"].values.sum() == SHARD
    print("sound")


def test_a_disk_that_is_full_and_one_that_is_read_only(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    work = f"import test_store_crash; test_store_crash.on_a_small_disk({str(tmp_path)!r})"
    mount = 'mount -t tmpfs -o size=500k none "$0" && exec "$@"'
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a disk of their own")
    found = subprocess.run([*private, sys.executable, "-c", work], capture_output=True, text=True, cwd=tests)
    assert found.stdout == "sound\n", found.stderr
