"""A thousand changes of roles while a job runs: is anything lost or done twice, and how soon does a new role work?

python tests/bench/retags.py [--retags 1000] [--workers 8] [--kills 0]

The scheduler gives a random worker another single stage every few milliseconds, beside what the controller decides.
A change is timed until the first task of the new role is placed on the worker, from when the stage last had something
that may start and nobody to take it; one that another change overtakes is not. ``--kills`` SIGKILLs so many workers
meanwhile; their nannies start others.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from typing import Any

from distributed import Client

import dfdask
from dfdask.cluster import LocalFleet

STAGES = {"encode": 0.005, "denoise": 0.04, "decode": 0.015}
PAUSE_SECONDS = 0.06
ITEMS_A_SECOND = 100  # of eight workers


async def retag(count: int, dask_scheduler: Any = None) -> dict[str, Any]:
    """On the scheduler: change roles ``count`` times; milliseconds from each change to its first task."""
    from dfdask.dispatch import Seat

    gate, chance = dask_scheduler.plugins["dfdask-gate"], random.Random(0)
    waiting: dict[str, tuple[str, float]] = {}
    took: list[float] = []
    bind, pump = gate._bind, gate._pump

    def timed(key: Any, address: str) -> None:
        bind(key, address)
        if address in waiting and key[0].startswith(waiting[address][0] + "-"):
            took.append(1000 * (time.perf_counter() - waiting.pop(address)[1]))

    def startable(stage: str) -> bool:
        return any(gate.dispatcher.startable_items(kind) > 0 for kind in gate.controller._left if kind[1] == stage)

    def pumped() -> None:
        pump()
        for worker, (stage, _) in list(waiting.items()):
            seat = gate.dispatcher._seats.get(worker)
            if seat is None or [kind[1] for kind in seat.own or ()] != [stage]:
                del waiting[worker]  # the controller gave it something else, or it was killed
            elif not startable(stage):  # others took what there was, or too many results wait
                waiting[worker] = stage, time.perf_counter()

    gate._bind, gate._pump = timed, pumped
    done = 0
    while done < count:
        kinds = [kind for kind in gate.controller._left if gate.controller.left(kind) > 0]
        workers = list(gate.ledger.workers)
        if kinds and workers:
            worker, kind = chance.choice(workers), chance.choice(kinds)
            if gate.dispatcher._seats[worker].own != (kind,):
                gate.dispatcher.seat(worker, Seat((kind,)))
                gate._wake()
                waiting[worker] = kind[1], time.perf_counter()
                done += 1
        await asyncio.sleep(PAUSE_SECONDS / 8)
    gate._bind, gate._pump = bind, pump
    return {"retags": done, "took": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retags", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DFDASK_CACHE"] = folder
        fleet = LocalFleet(options.workers)
        client = Client(fleet.address, set_as_default=False)
        client.wait_for_workers(options.workers)
        prompts = [
            f"prompt {number}" for number in range(int(options.retags * PAUSE_SECONDS / 8 * ITEMS_A_SECOND) + 400)
        ]
        job: dict[str, Any] = {"model": {"fake": {"stages": STAGES}}, "batch": 1, "shard": 40}
        client.register_plugin(counter())
        run = dfdask.submit(job, prompts=prompts, output=f"{folder}/run", client=client)
        time.sleep(1.0)
        killer = threading.Thread(target=kill, args=(client, options.kills), daemon=True)
        killer.start()
        told = client.run_on_scheduler(retag, options.retags)
        killer.join()
        before = run.progress.committed_items
        run.wait()
        made, left = client.run_on_scheduler(counted)
        client.close()
        fleet.close()
    took = sorted(told["took"])
    print(
        f"{told['retags']} changes of role, {len(took)} followed to their first task: median "
        f"{statistics.median(took):.1f} ms, 95% {took[int(0.95 * len(took))]:.1f} ms, most {took[-1]:.1f} ms"
    )
    print(
        f"{len(prompts)} items, {before} committed when the changes ended; {run.progress.committed_items} at the end, "
        f"{run.progress.failed_items} failed; workers lost {left}; tasks done by stage {made}"
    )


def counter() -> Any:
    """On the scheduler: tasks that ended in memory by stage, repeated ones included, and workers that went away."""
    from distributed.diagnostics.plugin import SchedulerPlugin

    class Counter(SchedulerPlugin):  # type: ignore[misc]
        name = "bench-counter"

        def __init__(self) -> None:
            self.done: dict[str, int] = {}
            self.left = 0

        def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
            if start == "processing" and finish == "memory" and isinstance(key, tuple):
                stage = str(key[0]).rpartition("-")[0]
                self.done[stage] = self.done.get(stage, 0) + 1

        def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
            self.left += 1

    return Counter()


def counted(dask_scheduler: Any = None) -> tuple[dict[str, int], int]:
    plugin = dask_scheduler.plugins["bench-counter"]
    return plugin.done, plugin.left


def kill(client: Client, kills: int) -> None:
    chance = random.Random(1)
    for _ in range(kills):
        time.sleep(1.0)
        pids: dict[str, int] = client.run(os.getpid, on_error="ignore")
        os.kill(chance.choice(list(pids.values())), signal.SIGKILL)


if __name__ == "__main__":
    main()
