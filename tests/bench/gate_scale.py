"""What the gate costs the scheduler for each task, in small fleets and large ones.

python tests/bench/gate_scale.py [--workers 10 100 1000] [--profile]

A real scheduler with the real gate serves simulated workers of two classes, which speak Dask's protocol through
in-process streams and only wait where a real one computes: 3 seconds a call on average, whatever the size of the
fleet. One job of three stages is submitted as one graph; ``--tasks`` are the stage calls for each worker. Prints CPU
milliseconds per stage call: the gate's, its parts, and what Dask's own scheduler takes for the same calls (its graph
and its state machine; neither streams nor serialization). Fails where the gate takes more than LIMIT_MS.
A short job in a small fleet pays more for each call: some decisions are made whatever its length.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dask
from dask._task_spec import List, Task, TaskRef
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from distributed import Client, Scheduler, wait
from distributed.batched import BatchedSend
from distributed.comm import Comm, connect
from distributed.core import CommClosedError
from distributed.versions import get_versions
from simulated import STAGES, address_of, call_seconds

from dfdask.cluster import SETTINGS
from dfdask.controller import ANY_CLASS
from dfdask.gate import WRITE, Gate
from dfdask.placement import Device, Option, StageWork, place
from dfdask.tags import stage_resource, task_key, worker_resources
from dfdask.telemetry import TELEMETRY

RUN, BATCH, SHARD_BATCHES = "run", 12, 4
WEIGHTS = {"encode": 9 << 30, "denoise": 24 << 30, "decode": 1 << 30}
WORKING_BYTES = 1 << 30
MEMORY = {"large": 80 << 30, "medium": 30 << 30}  # the second holds denoise alone, or the other two
RESULT_BYTES = {"encode": 12_000_000, "denoise": 400_000, "decode": 9_000_000}
WRITE_SECONDS = 0.1
LIMIT_MS = 0.5


class SimulatedWorker:
    """Speaks Dask's protocol over a stream and waits where a real worker computes, one call at a time."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self.address, self._rng = address_of(number), rng
        self._class = list(MEMORY)[number % len(MEMORY)]
        self._number = number
        self._queue: deque[dict[str, Any]] = deque()
        self._runs = False
        self._holds: set[str] = set()
        self._comm: Comm | None = None
        self._stream = BatchedSend(interval="5ms")

    async def serve(self, scheduler: str, joined: asyncio.Event) -> None:
        """Until the stream closes."""
        resources = worker_resources((), self._class, MEMORY[self._class], 1)
        self._comm = comm = await connect(scheduler)
        await comm.write(
            {
                "op": "register-worker",
                "reply": False,
                "address": self.address,
                "status": "running",
                "nthreads": 1,
                "name": self._number,
                "resolve_address": False,
                "now": time.time(),
                "resources": resources,
                "memory_limit": 64 << 30,
                "local_directory": "",
                "services": {},
                "nanny": "",
                "versions": get_versions(),
                "metrics": metrics(),
                "extra": {},
                "stimulus_id": f"joins-{self._number}",
                "server_id": f"simulated-{self._number}",
            }
        )
        answer = await comm.read()
        if answer["status"] != "OK":
            raise RuntimeError(answer)
        self._stream.start(comm)
        joined.set()
        try:
            while True:
                for message in await comm.read():
                    if message["op"] == "compute-task":
                        self._take(message)
        except CommClosedError:
            return

    def leave(self) -> None:
        self._stream.abort()
        if self._comm is not None:
            self._comm.abort()

    def _take(self, message: dict[str, Any]) -> None:
        if message["key"][0].startswith(WRITE):
            asyncio.get_running_loop().call_later(WRITE_SECONDS, self._done, message, WRITE, time.time())
        else:
            self._queue.append(message)
            self._go_on()

    def _go_on(self) -> None:
        if self._queue and not self._runs:
            self._runs = True
            message = self._queue.popleft()
            stage, items = message["key"][0].rpartition("-")[0], message["key"][3]
            seconds = call_seconds(stage, items, self._rng)
            asyncio.get_running_loop().call_later(seconds, self._computed, message, stage, time.time())

    def _computed(self, message: dict[str, Any], stage: str, start: float) -> None:
        self._done(message, stage, start)
        self._runs = False
        self._go_on()

    def _done(self, message: dict[str, Any], stage: str, start: float) -> None:
        stop = time.time()
        fetched = [key for key, holders in message["who_has"].items() if self.address not in holders]
        if fetched:
            self._stream.send({"op": "add-keys", "keys": fetched, "stimulus_id": "fetched"})
        told: dict[str, Any] = {}
        if stage in STAGES:
            if sum(WEIGHTS[name] for name in {*self._holds, stage}) + WORKING_BYTES > MEMORY[self._class]:
                self._holds = set()
            self._holds.add(stage)
            told = {"start": start, "seconds": stop - start, "load_seconds": 0.0, "holds": sorted(self._holds)}
        self._stream.send(
            {
                "op": "task-finished",
                "status": "OK",
                "key": message["key"],
                "run_id": message["run_id"],
                "nbytes": RESULT_BYTES.get(stage, 100),
                "type": b"",
                "typename": "list",
                "metadata": {TELEMETRY: told},
                "thread": 1,
                "startstops": [{"action": "compute", "start": start, "stop": stop}],
                "stimulus_id": "finished",
            }
        )


def metrics() -> dict[str, Any]:
    """As of a worker that does nothing: Dask asks for all of these."""
    return {
        "task_counts": {},
        "bandwidth": {"total": 1e8, "workers": {}, "types": {}},
        "digests_total_since_heartbeat": {},
        "managed_bytes": 0,
        "spilled_bytes": {"memory": 0, "disk": 0},
        "transfer": {"incoming_bytes": 0, "incoming_count": 0, "incoming_count_total": 0}
        | {"outgoing_bytes": 0, "outgoing_count": 0, "outgoing_count_total": 0},
        "event_loop_interval": 0.02,
        "cpu": 0.0,
        "memory": 1 << 30,
        "time": time.time(),
    }


@dataclass
class Meter:
    """CPU seconds by name: ``watch`` adds what a method takes, ``less_gate`` without the gate's part of it."""

    gate: Gate
    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def watch(self, owner: Any, method: str, name: str, less_gate: bool = False) -> None:
        setattr(owner, method, self.watched(getattr(owner, method), name, less_gate))

    def watched(self, function: Callable[..., Any], name: str, less_gate: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            gate, began = self.gate.seconds, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - began
                self.seconds[name] += took - (self.gate.seconds - gate) * less_gate
                self.calls[name] += 1

        return call


def graph(batches: int) -> tuple[HighLevelGraph, list[Any]]:
    """As dfdask's driver makes it: a layer for each stage; a write for each shard."""
    layers: dict[str, dict[Any, Any]] = {stage: {} for stage in (*STAGES, WRITE)}
    written = []
    for shard in range(batches // SHARD_BATCHES):
        last = []
        for index in range(SHARD_BATCHES):
            feed: Any = index
            for stage in STAGES:
                key = task_key(stage, RUN, shard, index, BATCH)
                layers[stage][key] = Task(key, abs, feed)
                feed = TaskRef(key)
            last.append(feed)
        key = task_key(WRITE, RUN, shard, 0, BATCH * SHARD_BATCHES)
        layers[WRITE][key] = Task(key, len, List(*last))
        written.append(key)
    names = list(layers)
    made = {
        stage: MaterializedLayer(layers[stage], annotations={"resources": stage_resource(stage), "priority": place})
        for place, stage in enumerate(names)
    }
    return HighLevelGraph(made, {stage: set(names[max(at - 1, 0) : at]) for at, stage in enumerate(names)}), written


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats("dfdask|numpy|highspy|statistics", 40)
        pstats.Stats(profile).sort_stats("cumulative").print_stats("dfdask", 40)


async def measure(count: int, tasks: int, profile: bool) -> dict[str, Any]:
    """Of one job on ``count`` workers with ``tasks`` stage calls for each."""
    batches = -(-count * tasks // len(STAGES) // SHARD_BATCHES) * SHARD_BATCHES
    calls = batches * len(STAGES)
    gate, rng = Gate(), random.Random(1)
    workers = [SimulatedWorker(number, rng) for number in range(count)]
    async with Scheduler(protocol="inproc://", dashboard=False, plugins=[gate]) as scheduler:
        joined = [asyncio.Event() for _ in workers]
        serving = [
            asyncio.create_task(worker.serve(scheduler.address, event))
            for worker, event in zip(workers, joined, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in joined))
        async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
            meter = Meter(gate)
            meter.watch(gate, "_decide", "decisions")
            meter.watch(gate.dispatcher, "assign", "placing")
            for method in ("_create_taskstate_from_graph", "transitions"):
                meter.watch(scheduler, method, "dask", less_gate=True)
            for op in ("task-finished", "add-keys"):
                scheduler.stream_handlers[op] = meter.watched(scheduler.stream_handlers[op], "dask", less_gate=True)
            before, began, cpu = gate.seconds, time.perf_counter(), time.thread_time()
            scheduler.handlers["dfdask_start_job"](job=job(batches), client=client.id)
            tasks_graph, written = graph(batches)
            with profiled(profile), client.as_current():
                futures = client.get(tasks_graph, written, sync=False)
                await wait(futures)  # gathering would ask the simulated workers for data
            wall, cpu, seconds = time.perf_counter() - began, time.thread_time() - cpu, gate.seconds - before
            done = sum(stage.done_items for stage in gate.ledger.jobs[RUN].stages.values())
            if done != calls * BATCH:
                raise RuntimeError(f"{done} items are done, not {calls * BATCH}")
            del futures
            scheduler.handlers["dfdask_end_job"](run=RUN)
        scheduler.remove_plugin(gate.name)  # what follows is not measured
        for worker in workers:
            worker.leave()
        await asyncio.gather(*serving)
    per = 1000 / calls
    parts = {name: meter.seconds[name] * per for name in ("decisions", "placing")}
    return {
        "workers": count,
        "calls": calls,
        "calls_per_second": round(calls / wall, 1),
        "gate_ms": round(seconds * per, 3),
        **{f"{name}_ms": round(value, 3) for name, value in parts.items()},
        "transitions_ms": round(seconds * per - sum(parts.values()), 3),
        "decisions": meter.calls["decisions"],
        "dask_ms": round(meter.seconds["dask"] * per, 3),
        "loop_busy": f"{cpu / wall:.0%}",
    }


def job(batches: int) -> dict[str, Any]:
    stages = [
        {
            "name": stage,
            "weights": {stage: WEIGHTS[stage]},
            "working_bytes": WORKING_BYTES,
            "load_seconds": {ANY_CLASS: WEIGHTS[stage] / 3e9},
        }
        for stage in STAGES
    ]
    counts = {"items": batches * BATCH, "items_left": batches * BATCH, "committed_items": 0, "failed_items": 0}
    return {"run": RUN, "name": "job", "output": "", "model": "model", "stages": stages, "batch": BATCH, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument(
        "--tasks",
        type=int,
        help="stage calls for each worker; default 48 below 50 workers, 24 below 500, else 12",
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes; the figures are off then")
    options = parser.parse_args()
    rows = []
    place([StageWork("job", "stage", 1, {"cpu": [Option(1.0)]})], [Device("worker")])  # imports the solver
    with tempfile.TemporaryDirectory() as folder, dask.config.set(SETTINGS):
        for count in options.workers:
            os.environ["DFDASK_CACHE"] = f"{folder}/{count}"  # no costs learnt before
            tasks = options.tasks or (12 if count >= 500 else 24 if count >= 50 else 48)
            rows.append(asyncio.run(measure(count, tasks, options.profile)))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    over = [row["workers"] for row in rows if row["gate_ms"] > LIMIT_MS]
    if over and not options.profile:
        raise SystemExit(f"over {LIMIT_MS} ms a call with {over} workers")


if __name__ == "__main__":
    main()
