"""The elastic scheduler on real worker processes with stages that sleep: how near to the ideal it keeps them.

python tests/bench/elastic.py [--cases steady,shift,...] [--repeats 3] [--items 600] [--json FILE]

The share is of the ideal seconds for all items, by the seconds from the job's start at the gate to the last task's end;
``after the first`` leaves out the time until the first item was through. The gap is that between a worker's task and
its next. The machine should be quiet: eight workers sleep most of the time, and the scheduler needs a core of its own
when batches are short.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

import dfdask
from dfdask.cluster import LocalFleet
from dfdask.spec import WorkerGroup

FIRST = {"encode": 0.05, "denoise": 0.4, "decode": 0.15}
SECOND = {"encode": 0.3, "denoise": 0.1, "decode": 0.2}
SHORT = {"encode": 0.005, "denoise": 0.04, "decode": 0.015}
ONE_EACH = dict.fromkeys(FIRST, 1)  # bytes: a worker's memory says how many stages it holds


@dataclass(frozen=True)
class Case:
    """A fleet and a job; ``ideal_seconds`` for all items, ``aim`` the share of it that is to be reached."""

    workers: Sequence[WorkerGroup]
    fake: dict[str, Any]
    ideal_seconds: float
    aim: float
    items: int
    batch: int = 1
    shard: int = 12


def cases(items: int) -> dict[str, Case]:
    mixed = items * sum(FIRST.values())
    shift = {"at": items // 2, "stages": SECOND}
    eight = mixed / 8

    def fleet(count: int, memory: int | None = None, device_class: str | None = None) -> list[WorkerGroup]:
        return [WorkerGroup(count=count, memory=memory, device_class=device_class)]

    def fake(costs: dict[str, float], **more: Any) -> dict[str, Any]:
        return {"stages": costs, "weights": ONE_EACH, **more}

    short = 8 * items
    speeds = {"fast": 0.5, "slow": 1.0}
    uneven = [*fleet(2, 3, "fast"), *fleet(4, 3, "slow"), *fleet(2, 1, "slow")]
    return {
        "steady": Case(fleet(8), fake(FIRST), eight, 0.97, items),
        "shift": Case(fleet(8), fake(FIRST, shift=shift), eight, 0.97, items),
        "two of three, steady": Case(fleet(8, 2), fake(FIRST), eight, 0.95, items),
        "two of three, shift": Case(fleet(8, 2), fake(FIRST, shift=shift), eight, 0.92, items),
        "short, batch 4": Case(fleet(8), fake(SHORT), short * sum(SHORT.values()) / 8, 0.90, short, 4, 80),
        # A bound that no schedule beats: every worker loads at least once.
        "one stage, switch 2 s": Case(fleet(8, 1), fake(FIRST, load_seconds=2.0), eight + 2.0, 0.90, items),
        "one worker": Case(
            fleet(1, 1), fake(FIRST, load_seconds=2.0), items // 10 * 0.6 + 3 * 2.0, 1 / 1.05, items // 10, 1, 12
        ),
        # Every result is made on one worker and used on another; the share shows what waiting for them costs.
        "handoffs of 16 MB": Case(
            fleet(8, 1), fake(FIRST, handoff_bytes=16_000_000), items // 2 * sum(FIRST.values()) / 8, 0.90, items // 2
        ),
        "mixed fleet": Case(uneven, fake(FIRST, speeds=speeds), mixed / (2 / 0.5 + 6), 0.92, items),
    }


@dataclass
class Outcome:
    share: float
    after_first: float
    seconds: float
    gap_ms: float
    moves: int
    error: float
    gate_ms_per_task: float
    idle: dict[str, float] = field(default_factory=dict)


def run_case(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DFDASK_CACHE"] = folder  # nothing is known of the costs
        fleet = LocalFleet(case.workers)
        client = Client(fleet.address, set_as_default=False)
        count = sum(group.count for group in case.workers)
        client.wait_for_workers(count)
        job = {"model": {"fake": case.fake}, "batch": case.batch, "shard": case.shard}
        warm = {"model": {"fake": {}}, "prompts": ["warm"] * 8 * count, "batch": 1, "shard": 8}
        dfdask.submit(warm, output=f"{folder}/warm", client=client).wait()
        number = ask(client, "dfdask_events")["next"]
        before = ask(client, "dfdask_progress", run="")["gate_seconds"]
        prompts = [f"prompt {item}" for item in range(case.items)]
        run = dfdask.submit(job, prompts=prompts, output=f"{folder}/run", client=client).wait()
        assert run.progress.committed_items == case.items and not run.progress.failed_items
        events = ask(client, "dfdask_events", number=number)["events"]
        gate = ask(client, "dfdask_progress", run="")["gate_seconds"] - before
        client.close()
        fleet.close()
    done = [event for event in events if event["event"] == "TaskDone"]
    first = next(event["when"] for event in events if event["event"] == "JobStarted" and event["items"] == case.items)
    seconds = max(event["start"] + event["seconds"] for event in done) - first
    busy = sum(event["seconds"] + event["load_seconds"] for event in done)
    through = sorted(event["start"] + event["seconds"] for event in done if event["stage"] == list(FIRST)[-1])
    items = sum(event["items"] for event in done if event["stage"] == list(FIRST)[-1])
    by_worker: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(done, key=lambda event: event["start"]):
        by_worker.setdefault(event["worker"], []).append(event)
    gaps = [
        after["start"] - after["load_seconds"] - before["start"] - before["seconds"]
        for events in by_worker.values()
        for before, after in itertools.pairwise(events)
    ]
    missed = [
        abs(event["predicted_seconds"] / event["seconds"] - 1)
        for event in done[len(done) // 10 :]
        if event["predicted_seconds"] and event["seconds"]
    ]
    return Outcome(
        share=case.ideal_seconds / seconds,
        after_first=(items - case.batch) / items * case.ideal_seconds / (through[-1] - through[0]),
        seconds=seconds,
        gap_ms=1000 * statistics.median(gaps),
        moves=sum(event["event"] == "RolesChanged" and bool(event["before"]) for event in events),
        error=statistics.median(missed),
        gate_ms_per_task=1000 * gate / len(done),
        idle={"idle": round(1 - busy / (seconds * count), 4)},
    )


def ask(client: Client, handler: str, **arguments: Any) -> Any:
    return client.sync(getattr(client.scheduler, handler), **arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names as in the table, separated by semicolons")
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    known = cases(options.items)
    wanted = [name.strip() for name in options.cases.split(";")] if options.cases else list(known)
    table = {}
    print(f"load {os.getloadavg()[0]:.2f}; {len(os.sched_getaffinity(0))} cores; {time.strftime('%F %T')}")
    for name in wanted:
        outcomes = [run_case(known[name]) for _ in range(options.repeats)]
        best = statistics.median(outcome.share for outcome in outcomes)
        table[name] = [outcome.__dict__ for outcome in outcomes]
        shares = ", ".join(f"{outcome.share:.3f}" for outcome in outcomes)
        after = statistics.median(outcome.after_first for outcome in outcomes)
        gap = statistics.median(outcome.gap_ms for outcome in outcomes)
        moves = statistics.median(outcome.moves for outcome in outcomes)
        gate = statistics.median(outcome.gate_ms_per_task for outcome in outcomes)
        error = statistics.median(outcome.error for outcome in outcomes)
        print(
            f"{name:24} median {best:.3f} of the ideal (aim {known[name].aim:.3f}; {shares}), "
            f"after the first {after:.3f}, {moves:.0f} moves, "
            f"idle {outcomes[0].idle['idle']:.3f}, gap {gap:.1f} ms, gate {gate:.2f} ms a task, "
            f"predictions off by {error:.1%}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
