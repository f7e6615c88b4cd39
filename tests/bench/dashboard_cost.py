"""What the page and the metrics cost the scheduler: 400 simulated workers, three jobs, 340 calls a second.

python tests/bench/dashboard_cost.py [--workers 400] [--pages 1] [--seconds 20]

A real scheduler with its dashboard serves real pages to readers in other processes; a gate that only simulates takes
the place of the real one, so that nothing else moves the figures. Prints the process's CPU share (less the simulation's
own) with the page closed and open, what one update costs, and what one scrape of the metrics costs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import prometheus_client
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from PIL import Image
from simulated import STAGES, address_of, call_seconds

from dfdask.dashboard import Dashboard
from dfdask.events import ClusterState, Event, JobState, RolesChanged, ShardWritten, StageState, TaskDone, WorkerState

JOBS, BATCH, SHARD = 3, 4, 16
SETTLE_SECONDS = 6.0
READER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from watcher import Watcher
with Watcher(sys.argv[2]) as watcher:
    time.sleep(float(sys.argv[3]))
    print(watcher.taken_bytes)
"""


class SimulatedGate(SchedulerPlugin):
    """States and events as a busy gate has them; ``seconds`` is the CPU that the simulation takes."""

    name = "dfdask-gate"

    def __init__(self, workers: int) -> None:
        self.seconds = 0.0
        self.events: deque[tuple[int, Event]] = deque(maxlen=50_000)
        self._random = random.Random(1)
        self._next = 0
        self._until = [time.time() + self._random.uniform(0, 2) for _ in range(workers)]
        self._stage = [self._random.choices(list(STAGES), [1, 10, 4])[0] for _ in range(workers)]
        self._done = [dict.fromkeys(STAGES, 0) for _ in range(JOBS)]
        picture = io.BytesIO()
        Image.frombytes("RGB", (96, 96), self._random.randbytes(96 * 96 * 3)).resize((64, 64)).save(picture, "JPEG")
        self._picture = picture.getvalue()

    def note(self, event: Event) -> None:
        self.events.append((self._next, event))
        self._next += 1

    def go_on(self) -> None:
        """Until now."""
        began, now = time.process_time(), time.time()
        for worker, until in enumerate(self._until):
            while until <= now:
                stage, job = self._stage[worker], self._random.randrange(JOBS)
                predicted = STAGES[stage] * BATCH
                seconds = call_seconds(stage, BATCH, self._random)
                address = address_of(worker)
                self.note(
                    TaskDone(
                        until, f"run{job}", stage, address, BATCH, until - seconds, seconds, 0.0, predicted, 500_000
                    )
                )
                self._done[job][stage] += BATCH
                if stage == "decode" and self._done[job][stage] % SHARD == 0:
                    row = self._done[job][stage]
                    pictures = {row + place: self._picture for place in range(4)}
                    self.note(ShardWritten(until, f"run{job}", row // SHARD, SHARD, 0, (), pictures))
                if self._random.random() < 0.01:
                    before, self._stage[worker] = stage, self._random.choice(list(STAGES))
                    after = {f"run{job}/{self._stage[worker]}": 1.0}
                    self.note(
                        RolesChanged(until, address, {f"run{job}/{before}": 1.0}, after, "why", "split", 9.0, 10.0)
                    )
                until += seconds
            self._until[worker] = until
        self.seconds += time.process_time() - began

    def state(self) -> ClusterState:
        """Counted as a cost: the real gate must make one, too."""
        jobs = tuple(
            JobState(
                *(f"run{job}", f"job {job}", f"runs/{job}", 0.0, 1.0, 1_000_000, done["decode"], 0),
                stages=tuple(
                    StageState(name, 100, 8, 20, done[name], 100, 1.0, 10_000_000, seconds, seconds, 0.1)
                    for name, seconds in STAGES.items()
                ),
                forecast_seconds=1000.0,
            )
            for job, done in enumerate(self._done)
        )
        workers = tuple(
            WorkerState(address_of(number), str(number), "gpu", 1, {stage: 1.0}, stage, 2, *([0.0] * 5))
            for number, stage in enumerate(self._stage)
        )
        return ClusterState(time.time(), jobs, workers, 0.0)


async def share(gate: SimulatedGate, seconds: float) -> float:
    """CPU seconds per second that this process takes beside the simulation."""
    cpu, own, began = time.process_time(), gate.seconds, time.perf_counter()
    while time.perf_counter() - began < seconds:
        await asyncio.sleep(0.2)
        gate.go_on()
    return (time.process_time() - cpu - (gate.seconds - own)) / (time.perf_counter() - began)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    gate, page = SimulatedGate(options.workers), Dashboard()
    async with Scheduler(
        host="127.0.0.1", port=0, dashboard=True, dashboard_address="127.0.0.1:0", plugins=[gate, page]
    ) as scheduler:
        await share(gate, SETTLE_SECONDS)
        before = await share(gate, options.seconds / 2)
        url = f"http://127.0.0.1:{scheduler.http_server.port}/dfdask"
        length = SETTLE_SECONDS + options.seconds
        command = [sys.executable, "-c", READER, str(Path(__file__).parents[1]), url, str(length)]
        readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.pages)]
        await share(gate, SETTLE_SECONDS)  # what it costs to open a page is another matter
        sampler = scheduler.plugins[Dashboard.name].sampler
        looks, spent = sampler.looks, sampler.spent.seconds
        opened = await share(gate, options.seconds - 2)
        looks, spent = sampler.looks - looks, sampler.spent.seconds - spent
        while any(reader.poll() is None for reader in readers):
            await share(gate, 0.5)
        pushed = sum(int(reader.communicate()[0]) for reader in readers)
        while sampler._views:  # Bokeh keeps a session for a while
            await share(gate, 1.0)
        closed = (before + await share(gate, options.seconds / 2)) / 2
        scrapes = []
        for _ in range(10):
            began = time.process_time()
            prometheus_client.generate_latest()
            scrapes.append(time.process_time() - began)
    per_second = looks / (options.seconds - 2)
    return {
        "workers": options.workers,
        "jobs": JOBS,
        "pages": options.pages,
        "scheduler_cpu_percent_page_closed": round(100 * closed, 2),
        "scheduler_cpu_percent_page_open": round(100 * opened, 2),
        "page_percent": round(100 * (opened - closed), 2),
        "updates_per_second": round(per_second, 2),
        "cpu_ms_per_update": round(1000 * (opened - closed) / per_second, 2),
        "of_which_without_sending": round(1000 * spent / looks, 2),
        "kilobytes_per_update_and_page": round(pushed / length / per_second / options.pages / 1000, 1),
        "metrics_cpu_ms_per_scrape": round(1000 * sorted(scrapes)[len(scrapes) // 2], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=400)
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    for name, value in asyncio.run(measure(parser.parse_args())).items():
        print(f"{name:36} {value}")


if __name__ == "__main__":
    main()
