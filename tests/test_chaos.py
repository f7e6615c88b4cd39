"""Whatever is killed, at any moment: the same command again ends with the same data, and redoes nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr
from fleet import ROOT, Fleet, family, until, worker_processes

SEED = int(os.environ.get("DFDASK_CHAOS_SEED", "20260727"))
ITEMS, SHARD = 60, 4
JOB = f"""
model: {{fake: {{stages: {{encode: 0.005, denoise: 0.03, decode: 0.01}}, fail: ["000007"]}}}}
prompts: prompts.txt
batch: 2
shard: {SHARD}
workers:
- {{stages: [encode, decode]}}
- {{stages: [denoise]}}
"""
TARGETS = ("worker", "worker command", "role", "role with its commands", "scheduler", "client")
MOMENTS = 10

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Undisturbed:
    """``setup``: seconds until the store is there; ``seconds``: until the command ends."""

    data: xr.Dataset
    setup: float
    seconds: float


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "job.yaml").write_text(JOB)
    (folder / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(ITEMS)))
    fleet = Fleet(folder)
    try:
        yield fleet
    finally:
        fleet.down()


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> Undisturbed:
    fleet.up()
    return measure(fleet, "--scheduler", fleet.address)


@pytest.fixture(scope="module")
def undisturbed_local(fleet: Fleet) -> Undisturbed:
    return measure(fleet)


def measure(fleet: Fleet, *options: str) -> Undisturbed:
    for attempt in ("cold", "warm"):  # the second has what the others will have: everything imported and cached
        run = f"undisturbed-{attempt}-{len(options)}"
        began = time.monotonic()
        client = fleet.spawn(f"{run}.log", "run", "job.yaml", "--output", f"./{run}", *options)
        until(lambda run=run: (fleet.folder / run / "zarr.json").exists(), 60, "the store")
        setup = time.monotonic() - began
        assert client.wait(90) == 0, fleet.log(f"{run}.log")
    with xr.open_zarr(fleet.folder / run) as data:
        return Undisturbed(data.load(), setup, time.monotonic() - began)


def commits(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "commits").glob("[0-9]*.json")}


def moment(target: str, number: int, of: int) -> float:
    """The share of the undisturbed time at which to kill: at random in the ``number``th of ``of`` equal parts."""
    return (number + random.Random(f"{SEED} {target} {number} {of}").random()) / of


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def strike(fleet: Fleet, target: str, client: subprocess.Popen[bytes], chance: random.Random) -> None:
    if target == "worker":
        kill(chance.choice(worker_processes(filter(None, fleet.workers))))
    elif target == "worker command":
        kill(chance.choice([process for process in fleet.workers if process]))
    elif target == "role":
        for process in worker_processes(fleet.by_role("denoise")):
            kill(process)
    elif target == "role with its commands":
        for command in fleet.by_role("denoise"):
            for process in family(command.pid):
                kill(process)
            command.wait(10)
    elif target == "scheduler":
        assert fleet.scheduler
        kill(fleet.scheduler)
        fleet.scheduler.wait(10)
    else:
        kill(client)


def recover(fleet: Fleet, target: str) -> None:
    """What an operator does: start what is not there any more. Worker processes come back by themselves."""
    if target == "worker command":
        until(lambda: any(process and process.poll() is not None for process in fleet.workers), 10, "the death")
    if target == "scheduler":
        ended = [process for process in fleet.workers if process]
        fleet.up()
        until(lambda: all(process.poll() is not None for process in ended), 60, "workers without a scheduler to end")
    fleet.up()


def check(fleet: Fleet, run: Path, before: dict[str, bytes], struck: float, expected: xr.Dataset) -> None:
    with xr.open_zarr(run) as data:
        assert set(data.variables) == set(expected.variables)
        for name in expected.variables:
            assert np.array_equal(data[name].values, expected[name].values), name
    after = commits(run)
    assert len(after) == -(-ITEMS // SHARD)
    for shard, data in before.items():
        assert after[shard] == data, f"{shard} was committed again"
    done = {int(name.split(".")[0]) for name in before}
    again = [
        (round(when - struck, 3), stage, item)
        for when, stage, item in fleet.computed()
        if when > struck and int(item) // SHARD in done
    ]
    assert not again, f"computed again after the kill: {again}"


def finish(fleet: Fleet, run: str, options: tuple[str, ...], client: subprocess.Popen[bytes]) -> int:
    """Wait for the command, and give it again until it ends well. Returns how often it was given again."""
    for times in range(4):
        code = client.wait(100)
        log = fleet.log(f"{run}-{times}.log")
        # A process that is being started when its parent is killed reads half a message: Python itself prints that.
        unwanted = str(ROOT / "dfdask") if code == -signal.SIGKILL else "Traceback"
        assert unwanted not in log, log
        if code == 0:
            return times
        assert code in (4, -signal.SIGKILL), log
        client = give(fleet, run, options, times + 1)
    raise AssertionError(log)


def give(fleet: Fleet, run: str, options: tuple[str, ...], start: int) -> subprocess.Popen[bytes]:
    """Start the command for the ``start``th time; each start has a log of its own."""
    return fleet.spawn(f"{run}-{start}.log", "run", "job.yaml", "--output", f"./{run}", *options)


def trial(fleet: Fleet, undisturbed: Undisturbed, target: str, number: int, of: int) -> None:
    share = moment(target, number, of)
    chance = random.Random(f"{SEED} {target} {number} {of} victim")
    run = f"{target}-{number}-{of}".replace(" ", "-")
    options = () if target == "local client" else ("--scheduler", fleet.address)
    if options:
        fleet.up()
    client = give(fleet, run, options, 0)
    began = time.monotonic()
    if "client" in target:
        wait = share * undisturbed.seconds
    else:  # it can only matter to the others from when there is work
        until(lambda: (fleet.folder / run / "zarr.json").exists(), 60, "the store")
        began = time.monotonic()
        wait = share * (undisturbed.seconds - undisturbed.setup)
    while time.monotonic() - began < wait and client.poll() is None:
        time.sleep(0.001)
    ended = client.poll() is not None
    below = family(client.pid)[1:] if target == "local client" else []
    before = commits(fleet.folder / run)
    struck = time.time()
    strike(fleet, target, client, chance)
    print(
        f"seed {SEED}, {target} {number}/{of}: struck at {share:.2f}, {wait:.2f} s, {len(before)} shards "
        f"committed{', the command had ended' if ended else ''}",
        flush=True,
    )
    if below:
        _, alive = psutil.wait_procs(below, timeout=10)
        assert not alive, f"outlived the client: {alive}"
    if options:
        recover(fleet, target)
    again = finish(fleet, run, options, client)
    print(f"complete {time.time() - struck:.1f} s later, the command given {again} times again", flush=True)
    check(fleet, fleet.folder / run, before, struck, undisturbed.data)


@pytest.mark.parametrize("target", TARGETS)
def test_a_kill_costs_no_data_and_no_committed_shard(fleet: Fleet, undisturbed: Undisturbed, target: str) -> None:
    trial(fleet, undisturbed, target, 0, 1)


def test_a_kill_of_a_local_run_leaves_no_process(fleet: Fleet, undisturbed_local: Undisturbed) -> None:
    trial(fleet, undisturbed_local, "local client", 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
@pytest.mark.parametrize("target", TARGETS)
def test_kills_at_many_moments(fleet: Fleet, undisturbed: Undisturbed, target: str, number: int) -> None:
    trial(fleet, undisturbed, target, number, MOMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
def test_kills_of_a_local_run_at_many_moments(fleet: Fleet, undisturbed_local: Undisturbed, number: int) -> None:
    trial(fleet, undisturbed_local, "local client", number, MOMENTS)
